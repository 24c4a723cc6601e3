// From XLA's buffers to Problem and Params, by name. Whatever a caller passes is checked here, so that the
// engines need not: a malformed call becomes a status that names the argument, what was expected and what
// came.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/layout_name.h"
#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"
#include "ffi/bind.h"
#include "ffi/expect.h"
#include "xla/ffi/api/ffi.h"

namespace jpa {

// Scales per token and head of a pool; [0, 0, 0]: there are none.
inline Status ParseTokenScales(const NamedBuffer& scales, const NamedBuffer& pages, const float** parsed) {
  *parsed = nullptr;
  if (Status s = ExpectRank(scales); !s.ok()) return s;
  if (scales.dim(0) == 0 && scales.dim(1) == 0 && scales.dim(2) == 0) return Expect(scales, {0, 0, 0});
  const auto dims = pages.buffer.dimensions();
  if (Status s = Expect(scales, {dims[0], dims[1], dims[2]}); !s.ok()) return s;
  *parsed = scales.data<const float>();
  return Status::Ok();
}

// The shape of a pool, in the order of its axes.
struct PoolShape {
  const char* text;
  size_t pages, page_size, heads;  // axes; the head dimension is the last one
  int64_t heads_per_kv_head;
  bool may_lack_heads = false;  // [P, S, H] for K = 1
};

constexpr PoolShape ShapeOfPool(PageLayout layout) {
  switch (layout) {
    case PageLayout::kSplit:
      return {.text = "[P, S, K, H]", .pages = 0, .page_size = 1, .heads = 2, .heads_per_kv_head = 1};
    case PageLayout::kValuesInKeys:
      return {.text = "[P, S, K, H]",
              .pages = 0,
              .page_size = 1,
              .heads = 2,
              .heads_per_kv_head = 1,
              .may_lack_heads = true};
    case PageLayout::kInterleaved:
      return {.text = "[P, S, 2K, H]", .pages = 0, .page_size = 1, .heads = 2, .heads_per_kv_head = 2};
    case PageLayout::kHeadMajor:
      return {.text = "[K, P, S, H]", .pages = 1, .page_size = 2, .heads = 0, .heads_per_kv_head = 1};
  }
  return {};
}

// The facts that both pools share.
struct Pools {
  DType dtype;
  int64_t num_k_pages, num_v_pages, page_size, num_kv_heads, num_padding_heads, head_dim, value_dim;
};

// A layout that the version of a target has: values in keys came last.
inline Status ParseLayoutOf(std::string_view name, bool may_be_values_in_keys, PageLayout* layout) {
  if (Status s = ParseLayout(name, layout); !s.ok()) return s;
  if (*layout != PageLayout::kValuesInKeys || may_be_values_in_keys) return Status::Ok();
  return Status::InvalidArgument("layout: expected split, interleaved or head_major, got " +
                                 std::string(name));
}

// Bytes in front of a pool's first value; a pool without pages has no memory to point into.
constexpr int64_t FirstValue(PageLayout layout, int64_t num_pages, int64_t head_dim, DType dtype) {
  return layout == PageLayout::kInterleaved && num_pages > 0 ? head_dim * ByteWidth(dtype) : 0;
}

// Where the head dim of a write's pool is, if its size is not given.
inline constexpr int64_t kInLastAxis = 0;  // of four
inline constexpr int64_t kNowhere = -1;    // it is 1 and has no axis

// The heads of a token: one dimension, or, of an interleaved pool whose head dim is known, any number of
// them.
inline Status ParseHeads(const NamedBuffer& pages, const PoolShape& shape, int64_t head_dim, int64_t* heads,
                         int64_t* parsed_head_dim) {
  const bool interleaved = shape.heads_per_kv_head > 1;
  if (head_dim == kInLastAxis && shape.may_lack_heads && pages.rank() == 3) {
    *heads = 1;
    *parsed_head_dim = pages.dim(2);
    return Status::Ok();
  }
  if (head_dim == kInLastAxis || (head_dim == kNowhere && !interleaved)) {
    if (pages.rank() != (head_dim == kNowhere ? 3 : 4))
      return Mismatch(pages, std::string("shape ") + shape.text);
    *heads = pages.dim(shape.heads);
    *parsed_head_dim = head_dim == kNowhere ? 1 : pages.dim(3);
    return Status::Ok();
  }
  *parsed_head_dim = head_dim == kNowhere ? 1 : head_dim;
  int64_t numbers = 1;
  for (size_t axis = shape.heads; axis < pages.rank(); ++axis) numbers *= pages.dim(axis);
  if (pages.rank() <= shape.heads || numbers % *parsed_head_dim != 0) {
    return Mismatch(pages,
                    "shape [P, S, ...] with whole heads of " + std::to_string(*parsed_head_dim) + " numbers");
  }
  *heads = numbers / *parsed_head_dim;
  return Status::Ok();
}

// An interleaved pool has at least 2 * `num_kv_heads` heads; 0: as many key/value heads as it has room for.
// See ParseHeads for a `head_dim` other than 0.
// `own_value_dim`: the last axis of v_pages need not be that of k_pages.
inline Status ParsePages(const NamedBuffer& k_pages, const NamedBuffer& v_pages, PageLayout layout,
                         int64_t num_kv_heads, int64_t head_dim, bool own_value_dim, Pools* pools) {
  const PoolShape shape = ShapeOfPool(layout);
  int64_t heads = 0;
  if (Status s = ParseHeads(k_pages, shape, head_dim, &heads, &pools->head_dim); !s.ok()) return s;
  if (!ParseDType(k_pages.dtype(), &pools->dtype)) {
    return Mismatch(k_pages, "float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8");
  }
  pools->num_k_pages = k_pages.dim(shape.pages);
  pools->page_size = k_pages.dim(shape.page_size);
  if (pools->page_size < 1 || heads < 1 || pools->head_dim < 1) {
    return Mismatch(k_pages, "at least 1 in dimensions S, K and H");
  }
  if (layout == PageLayout::kInterleaved && num_kv_heads > 0) {
    pools->num_kv_heads = num_kv_heads;
    pools->num_padding_heads = heads - 2 * num_kv_heads;
    if (pools->num_padding_heads < 0) {
      return Mismatch(k_pages, "at least " + std::to_string(2 * num_kv_heads) + " heads");
    }
  } else {
    if (heads % shape.heads_per_kv_head != 0) return Mismatch(k_pages, std::string("shape ") + shape.text);
    pools->num_kv_heads = heads / shape.heads_per_kv_head;
    pools->num_padding_heads = 0;
  }
  if (v_pages.rank() != k_pages.rank()) return Mismatch(v_pages, "the rank of k_pages");
  pools->num_v_pages = v_pages.dim(shape.pages);
  std::vector<int64_t> expected(k_pages.buffer.dimensions().begin(), k_pages.buffer.dimensions().end());
  expected[shape.pages] = pools->num_v_pages;
  pools->value_dim = pools->head_dim;
  if (own_value_dim && layout != PageLayout::kInterleaved) {
    pools->value_dim = expected.back() = v_pages.dim(v_pages.rank() - 1);
    if (pools->value_dim < 1) return Mismatch(v_pages, "at least 1 in dimension Hv");
  }
  if (layout != PageLayout::kValuesInKeys) return Expect(v_pages, k_pages.dtype(), expected);
  if (pools->num_v_pages != 0) return Mismatch(v_pages, "no pages, since k_pages holds the values");
  if (pools->value_dim > pools->head_dim) {
    return Mismatch(v_pages, "at most the H = " + std::to_string(pools->head_dim) + " numbers of a key");
  }
  pools->num_v_pages = pools->num_k_pages;
  expected[shape.pages] = 0;
  return Expect(v_pages, k_pages.dtype(), expected);
}

// The numbers of a call that XLA hands over as attributes.
inline Status CheckAttributes(const AttentionAttributes& attributes) {
  if (!std::isfinite(attributes.scale)) {
    return Status::InvalidArgument("scale: expected a finite number, got " +
                                   std::to_string(attributes.scale));
  }
  if (!std::isfinite(attributes.soft_cap) || attributes.soft_cap < 0) {
    return Status::InvalidArgument("soft_cap: expected a finite number >= 0 (0: none), got " +
                                   std::to_string(attributes.soft_cap));
  }
  if (attributes.sliding_window < 0) {
    return Status::InvalidArgument("sliding_window: expected a number >= 0 (0: none), got " +
                                   std::to_string(attributes.sliding_window));
  }
  return Status::Ok();
}

// Which rows of q each sequence has.
inline Status ExpectRows(const AttentionTensors& tensors, bool decode, int64_t num_seqs) {
  if (tensors.Has("cu_q_lens")) {
    if (Status s = Expect(tensors["cu_q_lens"], {num_seqs + 1}); !s.ok()) return s;
    if (Status s = ExpectRank(tensors["num_seqs"]); !s.ok()) return s;
    const bool is_given = tensors["num_seqs"].dim(0) != 0;
    return Expect(tensors["num_seqs"], {is_given ? 1 : 0});
  }
  const int64_t num_ranges = decode ? 0 : num_seqs;
  if (Status s = Expect(tensors["q_starts"], {num_ranges}); !s.ok()) return s;
  return Expect(tensors["q_counts"], {num_ranges});
}

// Dtypes and shapes of all tensors against each other.
inline Status ParseAttentionProblem(const AttentionTensors& tensors, const Target& target,
                                    const AttentionAttributes& attributes, AttentionProblem* problem) {
  const NamedBuffer &q = tensors["q"], &k_pages = tensors["k_pages"], &block_tables = tensors["block_tables"];
  DType q_dtype{};
  PageLayout layout{};
  Pools pools{};
  const bool own_value_dim = target.version >= kValueDimSince;
  if (Status s = ParseLayoutOf(attributes.layout, own_value_dim, &layout); !s.ok()) return s;
  if (Status s = ExpectRank(q); !s.ok()) return s;
  if (Status s = ParseFloating(q, &q_dtype); !s.ok()) return s;
  if (Status s = ExpectRank(tensors["k_scale"]); !s.ok()) return s;
  const int64_t given_kv_heads = target.version >= kPaddingSince ? tensors["k_scale"].dim(1) : 0;
  if (Status s =
          ParsePages(k_pages, tensors["v_pages"], layout, given_kv_heads, kInLastAxis, own_value_dim, &pools);
      !s.ok())
    return s;
  if (pools.dtype != q_dtype && ByteWidth(pools.dtype) > 1) {
    return Mismatch(k_pages, std::string("the dtype of q, ") + NameOf(q.dtype()) + ", or an 8-bit dtype");
  }
  const int64_t num_rows = q.dim(0), num_q_heads = q.dim(1), head_dim = q.dim(2);
  const int64_t num_kv_heads = pools.num_kv_heads;
  const bool may_be_padded = layout == PageLayout::kValuesInKeys;
  const int64_t num_padding_columns = may_be_padded ? pools.head_dim - head_dim : 0;
  if (num_padding_columns < 0 || (!may_be_padded && head_dim != pools.head_dim)) {
    return Mismatch(k_pages, "the head dimension of q, " + std::to_string(head_dim));
  }
  if (num_padding_columns > 0 && pools.head_dim * ByteWidth(pools.dtype) % 16 != 0) {
    return Mismatch(k_pages, "padded keys of a multiple of 16 bytes");
  }
  if (may_be_padded && pools.value_dim > head_dim) {
    return Mismatch(tensors["v_pages"], "at most the H = " + std::to_string(head_dim) + " numbers of a key");
  }
  if (num_q_heads < 1 || num_q_heads % num_kv_heads != 0) {
    return Mismatch(q, "N a positive multiple of K = " + std::to_string(num_kv_heads));
  }
  if (Status s = ExpectRank(block_tables); !s.ok()) return s;
  const int64_t num_seqs = block_tables.dim(0), max_pages = block_tables.dim(1);
  if (Status s = Expect(block_tables, {num_seqs, max_pages}); !s.ok()) return s;
  if (Status s = Expect(tensors["kv_lens"], {num_seqs}); !s.ok()) return s;
  if (Status s = ExpectRows(tensors, attributes.decode, num_seqs); !s.ok()) return s;
  if (attributes.decode && num_rows != num_seqs) {
    return Mismatch(q, "one row for each of the " + std::to_string(num_seqs) + " sequences");
  }
  if (Status s = ExpectRepeated(tensors["sinks"], num_q_heads, num_seqs, "B"); !s.ok()) return s;
  if (Status s = ExpectRepeated(tensors["k_scale"], num_kv_heads, num_seqs, "B"); !s.ok()) return s;
  if (Status s = ExpectRepeated(tensors["v_scale"], num_kv_heads, num_seqs, "B"); !s.ok()) return s;
  if (Status s = Expect(tensors["out"], q.dtype(), {num_rows, num_q_heads, pools.value_dim}); !s.ok())
    return s;
  if (Status s = Expect(tensors["lse"], {num_rows, num_q_heads}); !s.ok()) return s;
  // The engine says how much workspace it takes.
  const NamedBuffer& workspace = tensors["workspace"];
  if (workspace.dtype() != ffi::DataType::U8 || workspace.rank() != 1) return Mismatch(workspace, "uint8[W]");

  *problem = {.q_dtype = q_dtype,
              .kv_dtype = pools.dtype,
              .num_rows = num_rows,
              .num_q_heads = num_q_heads,
              .num_kv_heads = num_kv_heads,
              .head_dim = head_dim,
              .value_dim = pools.value_dim,
              .page_size = pools.page_size,
              .num_k_pages = pools.num_k_pages,
              .num_v_pages = pools.num_v_pages,
              .num_seqs = num_seqs,
              .max_pages = max_pages,
              .num_sinks = tensors["sinks"].dim(0),
              .num_k_scales = tensors["k_scale"].dim(0),
              .num_v_scales = tensors["v_scale"].dim(0),
              .layout = layout,
              .num_padding_heads = pools.num_padding_heads,
              .num_padding_columns = num_padding_columns};
  return Status::Ok();
}

inline Status ParseAttention(const AttentionTensors& tensors, const Target& target,
                             const AttentionAttributes& attributes, AttentionProblem* problem,
                             AttentionParams* params) {
  if (Status s = ParseAttentionProblem(tensors, target, attributes, problem); !s.ok()) return s;
  if (Status s = CheckAttributes(attributes); !s.ok()) return s;

  const auto strides_of = [&](int64_t num_pages, int64_t head_dim) {
    return StridesOf(problem->layout, num_pages, problem->page_size, problem->num_kv_heads, head_dim,
                     problem->num_padding_heads);
  };
  const PageStrides k_strides =
      strides_of(problem->num_k_pages, problem->head_dim + problem->num_padding_columns);
  const int64_t first_value =
      FirstValue(problem->layout, problem->num_v_pages, problem->head_dim, problem->kv_dtype);
  const float *k_token_scales = nullptr, *v_token_scales = nullptr;
  if (tensors.Has("k_token_scales")) {
    const auto parse = [&](AttentionTensors::Name name, AttentionTensors::Name pages, const float** parsed) {
      if (Status s = ParseTokenScales(tensors[name], tensors[pages], parsed); !s.ok()) return s;
      if (*parsed == nullptr || !problem->ValuesInKeys()) return Status::Ok();
      return Mismatch(tensors[name], "float32[0, 0, 0], since k_pages holds the values");
    };
    if (Status s = parse("k_token_scales", "k_pages", &k_token_scales); !s.ok()) return s;
    if (Status s = parse("v_token_scales", "v_pages", &v_token_scales); !s.ok()) return s;
  }
  const auto data_of = [&](AttentionTensors::Name name) {
    return tensors.Has(name) ? tensors[name].data_or_null<const int32_t>() : nullptr;
  };
  problem->has_token_scales = k_token_scales != nullptr || v_token_scales != nullptr;
  if (first_value > 0 && v_token_scales != nullptr) ++v_token_scales;  // value head 0 is behind key head 0
  *params = {
      .q = tensors["q"].data<const void>(),
      .k_pages = tensors["k_pages"].data<const void>(),
      .v_pages = problem->ValuesInKeys() ? tensors["k_pages"].data<const char>()
                                         : tensors["v_pages"].data<const char>() + first_value,
      .block_tables = tensors["block_tables"].data<const int32_t>(),
      .kv_lens = tensors["kv_lens"].data<const int32_t>(),
      .q_starts = data_of("q_starts"),  // which decode has none of
      .q_counts = data_of("q_counts"),
      .cu_q_lens = data_of("cu_q_lens"),
      .num_seqs = data_of("num_seqs"),
      .sinks = tensors["sinks"].data_or_null<const float>(),
      .k_scale = tensors["k_scale"].data_or_null<const float>(),
      .v_scale = tensors["v_scale"].data_or_null<const float>(),
      .k_token_scales = k_token_scales,
      .v_token_scales = v_token_scales,
      .out = tensors["out"].data<void>(),
      .lse = tensors["lse"].data<float>(),
      .workspace = tensors["workspace"].data<float>(),
      .k_strides = k_strides,
      .v_strides = problem->ValuesInKeys() ? k_strides : strides_of(problem->num_v_pages, problem->value_dim),
      .scale = attributes.scale,
      .soft_cap = attributes.soft_cap,
      .sliding_window = attributes.sliding_window,
      .causal = attributes.causal};
  return Status::Ok();
}

inline Status ParseWrite(const WriteTensors& tensors, const Target& target, const WriteAttributes& attributes,
                         WriteProblem* problem, WriteParams* params) {
  const NamedBuffer &k_pages = tensors["k_pages"], &v_pages = tensors["v_pages"], &k = tensors["k"];
  const NamedBuffer &k_result = tensors["k_pages (result)"], &v_result = tensors["v_pages (result)"];
  DType new_dtype{};
  PageLayout layout{};
  Pools pools{};
  const bool may_own_value_dim = target.version >= kWriteValueDimSince;
  if (Status s = ParseLayoutOf(attributes.layout, may_own_value_dim, &layout); !s.ok()) return s;
  const bool has_values = layout != PageLayout::kValuesInKeys;
  const bool has_head_dim = target.version < kAnyAxesSince || !has_values || k.rank() != 2;
  if (has_head_dim) {
    if (Status s = ExpectRank(k); !s.ok()) return s;
  }
  const bool one_pool = layout == PageLayout::kInterleaved || !has_values;
  if (has_head_dim && k.dim(2) < 1) return Mismatch(k, "at least 1 in dimension H");
  const int64_t given_head_dim = layout == PageLayout::kInterleaved ? k.dim(2) : kInLastAxis;
  const int64_t head_dim = has_head_dim ? given_head_dim : kNowhere;
  const bool own_value_dim = may_own_value_dim && has_head_dim;
  if (Status s = ParsePages(k_pages, v_pages, layout, k.dim(1), head_dim, own_value_dim, &pools); !s.ok())
    return s;
  // A pool of one head that holds the values may have the tokens of a page in two axes.
  if (!has_values && k.dim(1) == 1) {
    pools.page_size *= pools.num_kv_heads;
    pools.num_kv_heads = 1;
  }
  const int64_t num_pages = pools.num_k_pages;
  if (one_pool && v_pages.dim(ShapeOfPool(layout).pages) != 0)
    return Mismatch(v_pages, "no pages, since k_pages holds the values");
  if (!one_pool && pools.num_v_pages != num_pages)
    return Mismatch(v_pages, "as many pages as k_pages, " + std::to_string(num_pages));
  if (Status s = ParseFloating(k, &new_dtype); !s.ok()) return s;
  const int64_t num_tokens = k.dim(0);
  std::vector<int64_t> rows = {num_tokens, pools.num_kv_heads, pools.head_dim};
  if (!has_head_dim) rows.pop_back();
  if (Status s = Expect(k, k.dtype(), rows); !s.ok()) return s;
  if (has_head_dim) rows.back() = has_values ? pools.value_dim : 0;
  if (Status s = Expect(tensors["v"], k.dtype(), rows); !s.ok()) return s;
  if (Status s = Expect(tensors["slot_mapping"], {num_tokens}); !s.ok()) return s;
  if (Status s = ExpectRepeated(tensors["k_scale"], pools.num_kv_heads, num_tokens, "T"); !s.ok()) return s;
  if (Status s = ExpectRepeated(tensors["v_scale"], pools.num_kv_heads, num_tokens, "T"); !s.ok()) return s;
  if (Status s = ExpectLike(k_result, k_pages); !s.ok()) return s;
  if (Status s = ExpectLike(v_result, v_pages); !s.ok()) return s;
  // The call is made with both pools aliased; anything else would return pages with only the new tokens in
  // them.
  const bool are_aliased = k_result.data<void>() == k_pages.data<void>() &&
                           (one_pool || v_result.data<void>() == v_pages.data<void>());
  if (!are_aliased) {
    return Status::InvalidArgument(
        "k_pages, v_pages: expected results aliased to these operands, got others");
  }

  const auto strides_of = [&](int64_t dim) {
    return StridesOf(layout, num_pages, pools.page_size, pools.num_kv_heads, dim, pools.num_padding_heads);
  };
  const int64_t first_value = FirstValue(layout, num_pages, pools.head_dim, pools.dtype);
  *problem = {.new_dtype = new_dtype,
              .kv_dtype = pools.dtype,
              .num_tokens = num_tokens,
              .num_kv_heads = pools.num_kv_heads,
              .head_dim = pools.head_dim,
              .value_dim = has_values ? pools.value_dim : 0,
              .page_size = pools.page_size,
              .num_pages = num_pages,
              .num_k_scales = tensors["k_scale"].dim(0),
              .num_v_scales = tensors["v_scale"].dim(0)};
  *params = {.k = k.data<const void>(),
             .v = tensors["v"].data<const void>(),
             .slot_mapping = tensors["slot_mapping"].data<const int32_t>(),
             .k_scale = tensors["k_scale"].data_or_null<const float>(),
             .v_scale = tensors["v_scale"].data_or_null<const float>(),
             .k_pages = k_result.data<void>(),
             .v_pages = one_pool ? k_result.data<char>() + first_value : v_result.data<void>(),
             .k_strides = strides_of(pools.head_dim),
             .v_strides = strides_of(pools.value_dim)};
  return Status::Ok();
}

}  // namespace jpa
