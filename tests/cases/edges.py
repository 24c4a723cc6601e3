"""Values at and beyond the edge of their meaning. All share the shapes of MIXED, DECODE or PROMPT."""

from __future__ import annotations

from cases.bases import DECODE, MIXED, PROMPT
from cases.case import Case
from cases.inputs import INT32_MAX, INT32_MIN


def cases() -> list[Case]:
    return [MIXED, DECODE, PROMPT, *_lengths(), *_row_starts(), *_page_ids(), *_numbers_of_sequences()]


def _lengths() -> list[Case]:
    return [
        PROMPT.vary("prompt_more_rows_than_keys", "rows before the first key see none", kv_lens=(20, 0, 1, 5)),
        MIXED.vary("length_zero", "a sequence may have rows and no keys", kv_lens=(0, 5, 0, 33)),
        MIXED.vary("length_zero_everywhere", "a batch without any key is all zeros", kv_lens=(0, 0, 0, 0)),
        MIXED.vary("length_negative", "lengths below 0 mean 0", kv_lens=(-1, INT32_MIN, 9, -33)),
        MIXED.vary("length_beyond_table", "lengths beyond the table mean all of it", kv_lens=(65, INT32_MAX, 1000, 64)),
        MIXED.vary("more_rows_than_keys", "positions before the first key are negative", kv_lens=(1, 2, 0, 3)),
        MIXED.vary("shared_prefix", "sequences may share pages", kv_lens=(40, 33, 32, 50), shared_pages=2),
        DECODE.vary("decode_length_zero", "a decode row may have no keys", kv_lens=(0, 17, 0, 64)),
        DECODE.vary("decode_length_outside", "decode clamps lengths, too", kv_lens=(-1, INT32_MIN, 65, INT32_MAX)),
    ]


def _row_starts() -> list[Case]:
    longer = (17, 30, 9, 33)  # enough keys for rows that other starts give to a sequence
    outside = (-5, 3, 3, 40, INT32_MAX)
    far = (INT32_MIN, -1, 6, INT32_MAX, 16)
    return [
        MIXED.vary("cu_starts_late", "rows before the first start belong to nobody", cu_q_lens=(2, 3, 8, 8, 13)),
        MIXED.vary("cu_outside", "starts are clamped to the rows there are", kv_lens=longer, cu_q_lens=outside),
        MIXED.vary("cu_far_outside", "differences of these starts overflow int32", cu_q_lens=far),
        MIXED.vary("cu_decreasing", "a start never falls back", kv_lens=longer, cu_q_lens=(0, 7, 3, 9, 14)),
        MIXED.vary("cu_all_beyond", "no sequence has a row", cu_q_lens=(99, 99, 99, 99, 99)),
    ]


def _page_ids() -> list[Case]:
    # P is 23 for PROMPT's shapes and 19 for the others.
    prompt = ((0, 0, -1), (0, 2, 23), (1, 0, INT32_MAX))
    far = ((0, 0, -1), (3, 0, INT32_MAX), (3, 2, INT32_MIN))
    near = ((0, 1, 19), (3, 1, 20), (3, 2, 38))
    all_of_two = ((0, 0, -1), (0, 1, 19), (1, 0, INT32_MIN))
    decode = ((0, 0, -1), (1, 0, 19), (2, 1, INT32_MAX), (3, 3, -19))
    return [
        PROMPT.vary("prompt_used_ids_bad", "row tiles skip pages outside the pool", bad_ids=prompt),
        MIXED.vary("used_ids_bad", "keys of pages outside the pool are not there", bad_ids=far),
        MIXED.vary("used_ids_just_bad", "ids just past the pool, and past two of it", bad_ids=near),
        MIXED.vary("used_ids_all_bad", "sequences with keys, none of which is there", bad_ids=all_of_two),
        DECODE.vary("decode_used_ids_bad", "decode skips pages outside the pool", bad_ids=decode),
    ]


def _numbers_of_sequences() -> list[Case]:
    live = MIXED.vary("num_seqs_all", "the number of sequences may be said", num_seqs=4)
    dead = {"num_seqs": 2, "cu_q_lens": (0, 1, 6, -7, INT32_MAX)}
    return [
        live,
        live.vary("num_seqs_two", "dead sequences may hold garbage", **dead),
        live.vary("num_seqs_zero", "no sequence is alive", num_seqs=0),
        live.vary("num_seqs_beyond", "a number beyond B means B", num_seqs=99),
        live.vary("num_seqs_negative", "a number below 0 means 0", num_seqs=-3),
    ]
