"""Serves a model over HTTP with OpenAI's interface: `python serve.py [--model DIR] [--port N]`."""

from __future__ import annotations

import argparse
import functools
import math
import os

import command_line

try:
    import dtypes
    from checkpoint import load

    from jax_paged_attn.serving import Engine
    from jax_paged_attn.serving.server import ChatTemplate, serve
except ModuleNotFoundError as error:
    command_line.fail_without(error)

KEY_VARIABLE = "JAX_PAGED_ATTN_API_KEY"
LONGEST_BY_DEFAULT = 4096
TOP_LOGPROBS = 20  # as many as OpenAI's interface has


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves a model over HTTP with OpenAI's interface.")
    positive = functools.partial(command_line.number, int, 1)
    command_line.add_model(parser)
    parser.add_argument(
        "--model-name", type=command_line.text, help="what clients call it; by default the folder's name"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at, default %(default)s: this machine only"
    )
    port = functools.partial(command_line.number, int, 0, most=65535)
    parser.add_argument(
        "--port", type=port, default=8000, metavar="N", help="0 for any that is free, default %(default)s"
    )
    parser.add_argument(
        "--api-key",
        type=command_line.text,
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"what clients have to know; by default the environment's {KEY_VARIABLE}, else nothing",
    )
    dtypes.add_arguments(parser)
    parser.add_argument(
        "--max-seqs", type=positive, default=16, metavar="N", help="requests per step, default %(default)s"
    )
    parser.add_argument(
        "--max-len",
        type=positive,
        metavar="N",
        help=f"tokens per prompt and output, by default the model's context, or {LONGEST_BY_DEFAULT} if that is longer",
    )
    parser.add_argument(
        "--page-size", type=positive, default=16, metavar="N", help="tokens per page, default %(default)s"
    )
    parser.add_argument("--num-pages", type=positive, metavar="N", help="by default enough for --max-seqs at --max-len")
    parser.add_argument(
        "--max-waiting", type=positive, default=256, metavar="N", help="requests in the queue, default %(default)s"
    )
    seconds = functools.partial(command_line.number, float, 0)
    parser.add_argument(
        "--grace",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="that requests may take at the server's end, default %(default)s",
    )
    arguments = parser.parse_args()
    dtypes.check_arguments(parser, arguments)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        checkpoint = load(arguments.model, dtype=dtypes.dtype_of(arguments))
        template = ChatTemplate.from_folder(arguments.model)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        model.fuse()
        context = model.config.max_position_embeddings
        max_len = min(context, arguments.max_len or LONGEST_BY_DEFAULT)
        engine = Engine(
            dtypes.served(model, tokenizer, arguments),
            num_pages=arguments.num_pages or arguments.max_seqs * math.ceil(max_len / arguments.page_size),
            page_size=arguments.page_size,
            max_seqs=arguments.max_seqs,
            max_len=max_len,
            buckets=(arguments.max_seqs, arguments.max_seqs + 56, arguments.max_seqs + 248),
            max_waiting=arguments.max_waiting,
            max_logprobs=TOP_LOGPROBS,
            tokenizer=tokenizer,
        )
    except ModuleNotFoundError as error:  # a tokenizer.json needs one more package
        command_line.fail_without(error)
    except ValueError as error:
        command_line.fail(error)
    engine.warm_up()
    serve(
        engine,
        tokenizer,
        model_name=arguments.model_name or arguments.model.resolve().name,
        host=arguments.host,
        port=arguments.port,
        grace=arguments.grace,
        stop_tokens=model.config.eos_token_ids,
        chat_template=template,
        api_key=arguments.api_key or None,
    )


if __name__ == "__main__":
    main()
