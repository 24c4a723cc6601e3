// From XLA's buffers to Problem and Params. Whatever a caller passes is checked here, so that the engines
// need not: a malformed call becomes a status that names the argument, what was expected and what came.
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
#include "xla/ffi/api/ffi.h"

namespace jpa {

namespace ffi = ::xla::ffi;

// A buffer with the name that errors call it by.
struct NamedBuffer {
  const char* name;
  ffi::AnyBuffer buffer;

  int64_t dim(size_t axis) const { return buffer.dimensions()[axis]; }
  size_t rank() const { return buffer.dimensions().size(); }
};

inline std::string ShapeOf(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (const int64_t dim : buffer.dimensions()) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(dim);
  }
  return text + "]";
}

inline const char* NameOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case ffi::DataType::F8E5M2:
      return "float8_e5m2";
    case ffi::DataType::S8:
      return "int8";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::S32:
      return "int32";
    default:
      return "another dtype";
  }
}

inline Status Mismatch(const NamedBuffer& argument, const std::string& expected) {
  return Status::InvalidArgument(std::string(argument.name) + ": expected " + expected + ", got " +
                                 NameOf(argument.buffer.element_type()) + ShapeOf(argument.buffer));
}

inline Status ExpectRank(const NamedBuffer& argument, size_t rank, const char* shape) {
  return argument.rank() == rank ? Status::Ok() : Mismatch(argument, std::string("shape ") + shape);
}

// Both dtype and shape, where all sizes are known.
inline Status Expect(const NamedBuffer& argument, ffi::DataType dtype, const std::vector<int64_t>& shape) {
  bool same = argument.buffer.element_type() == dtype && argument.rank() == shape.size();
  std::string text = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    same = same && argument.dim(axis) == shape[axis];
    text += (axis > 0 ? ", " : "") + std::to_string(shape[axis]);
  }
  return same ? Status::Ok() : Mismatch(argument, std::string(NameOf(dtype)) + text + "]");
}

// [X, columns] in f32, where X is 0 or divides `period`.
inline Status ExpectRepeated(const NamedBuffer& argument, int64_t columns, int64_t period,
                             const char* letter) {
  const bool fits = argument.buffer.element_type() == ffi::DataType::F32 && argument.rank() == 2 &&
                    argument.dim(1) == columns && (argument.dim(0) == 0 || period % argument.dim(0) == 0);
  if (fits) return Status::Ok();
  return Mismatch(argument, "float32[X, " + std::to_string(columns) + "] where X is 0 or divides " + letter +
                                " = " + std::to_string(period));
}

inline bool ParseDType(ffi::DataType dtype, DType* parsed) {
  switch (dtype) {
    case ffi::DataType::F32:
      *parsed = DType::kF32;
      return true;
    case ffi::DataType::BF16:
      *parsed = DType::kBF16;
      return true;
    case ffi::DataType::F16:
      *parsed = DType::kF16;
      return true;
    case ffi::DataType::F8E4M3FN:
      *parsed = DType::kE4M3FN;
      return true;
    case ffi::DataType::F8E5M2:
      *parsed = DType::kE5M2;
      return true;
    case ffi::DataType::S8:
      *parsed = DType::kS8;
      return true;
    default:
      return false;
  }
}

inline Status ParseFloating(const NamedBuffer& argument, DType* dtype) {
  if (ParseDType(argument.buffer.element_type(), dtype) && ByteWidth(*dtype) > 1) return Status::Ok();
  return Mismatch(argument, "float32, bfloat16 or float16");
}

// The shape of a pool, in the order of its axes.
struct PoolShape {
  const char* text;
  size_t pages, page_size, heads;  // axes; the head dimension is the last one
  int64_t heads_per_kv_head;
};

constexpr PoolShape ShapeOfPool(PageLayout layout) {
  switch (layout) {
    case PageLayout::kSplit:
      return {"[P, S, K, H]", 0, 1, 2, 1};
    case PageLayout::kInterleaved:
      return {"[P, S, 2K, H]", 0, 1, 2, 2};
    case PageLayout::kHeadMajor:
      return {"[K, P, S, H]", 1, 2, 0, 1};
  }
  return {};
}

// What both pools have in common.
struct Pools {
  DType dtype;
  int64_t num_k_pages, num_v_pages, page_size, num_kv_heads, head_dim;
};

inline Status ParsePages(const NamedBuffer& k_pages, const NamedBuffer& v_pages, PageLayout layout,
                         Pools* pools) {
  const PoolShape shape = ShapeOfPool(layout);
  if (Status s = ExpectRank(k_pages, 4, shape.text); !s.ok()) return s;
  if (!ParseDType(k_pages.buffer.element_type(), &pools->dtype)) {
    return Mismatch(k_pages, "float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8");
  }
  pools->num_k_pages = k_pages.dim(shape.pages);
  pools->page_size = k_pages.dim(shape.page_size);
  pools->head_dim = k_pages.dim(3);
  const int64_t heads = k_pages.dim(shape.heads);
  if (pools->page_size < 1 || heads < 1 || pools->head_dim < 1) {
    return Mismatch(k_pages, "at least 1 in dimensions S, K and H");
  }
  if (heads % shape.heads_per_kv_head != 0) return Mismatch(k_pages, std::string("shape ") + shape.text);
  pools->num_kv_heads = heads / shape.heads_per_kv_head;
  if (Status s = ExpectRank(v_pages, 4, shape.text); !s.ok()) return s;
  pools->num_v_pages = v_pages.dim(shape.pages);
  std::vector<int64_t> expected(k_pages.buffer.dimensions().begin(), k_pages.buffer.dimensions().end());
  expected[shape.pages] = pools->num_v_pages;
  return Expect(v_pages, k_pages.buffer.element_type(), expected);
}

template <typename T>
T* DataOrNull(const NamedBuffer& argument) {
  return argument.dim(0) == 0 ? nullptr : static_cast<T*>(argument.buffer.untyped_data());
}

struct AttentionBuffers {
  NamedBuffer q, k_pages, v_pages, block_tables, kv_lens, q_starts, q_counts, sinks, k_scale, v_scale;
  NamedBuffer out, lse, workspace;
};

struct AttentionAttributes {
  float scale;
  float soft_cap;
  int64_t sliding_window;
  bool causal;
  bool decode;  // sequence b has row b of q alone: q_starts and q_counts are empty
  std::string_view layout;
};

inline Status ParseAttention(const AttentionBuffers& buffers, const AttentionAttributes& attributes,
                             AttentionProblem* problem, AttentionParams* params) {
  const auto& [q, k_pages, v_pages, block_tables, kv_lens, q_starts, q_counts, sinks, k_scale, v_scale, out,
               lse, workspace] = buffers;

  DType q_dtype{};
  PageLayout layout{};
  Pools pools{};
  if (Status s = ParseLayout(attributes.layout, &layout); !s.ok()) return s;
  if (Status s = ExpectRank(q, 3, "[T, N, H]"); !s.ok()) return s;
  if (Status s = ParseFloating(q, &q_dtype); !s.ok()) return s;
  if (Status s = ParsePages(k_pages, v_pages, layout, &pools); !s.ok()) return s;
  if (pools.dtype != q_dtype && ByteWidth(pools.dtype) > 1) {
    return Mismatch(
        k_pages, std::string("the dtype of q, ") + NameOf(q.buffer.element_type()) + ", or an 8-bit dtype");
  }
  const int64_t num_rows = q.dim(0), num_q_heads = q.dim(1), head_dim = q.dim(2);
  const int64_t num_kv_heads = pools.num_kv_heads;
  if (head_dim != pools.head_dim) {
    return Mismatch(k_pages, "the head dimension of q, " + std::to_string(head_dim));
  }
  if (num_q_heads < 1 || num_q_heads % num_kv_heads != 0) {
    return Mismatch(q, "N a positive multiple of K = " + std::to_string(num_kv_heads));
  }
  if (Status s = ExpectRank(block_tables, 2, "[B, M]"); !s.ok()) return s;
  const int64_t num_seqs = block_tables.dim(0), max_pages = block_tables.dim(1);
  if (Status s = Expect(block_tables, ffi::DataType::S32, {num_seqs, max_pages}); !s.ok()) return s;
  if (Status s = Expect(kv_lens, ffi::DataType::S32, {num_seqs}); !s.ok()) return s;
  for (const NamedBuffer& vector : {q_starts, q_counts}) {
    if (Status s = Expect(vector, ffi::DataType::S32, {attributes.decode ? 0 : num_seqs}); !s.ok()) return s;
  }
  if (attributes.decode && num_rows != num_seqs) {
    return Mismatch(q, "one row for each of the " + std::to_string(num_seqs) + " sequences");
  }
  if (Status s = ExpectRepeated(sinks, num_q_heads, num_seqs, "B"); !s.ok()) return s;
  for (const NamedBuffer& scale : {k_scale, v_scale}) {
    if (Status s = ExpectRepeated(scale, num_kv_heads, num_seqs, "B"); !s.ok()) return s;
  }
  if (Status s = Expect(out, q.buffer.element_type(), {num_rows, num_q_heads, head_dim}); !s.ok()) return s;
  if (Status s = Expect(lse, ffi::DataType::F32, {num_rows, num_q_heads}); !s.ok()) return s;
  // How much workspace it takes is the engine's to say.
  if (workspace.buffer.element_type() != ffi::DataType::U8 || workspace.rank() != 1) {
    return Mismatch(workspace, "uint8[W]");
  }
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

  const auto strides_of = [&](int64_t num_pages) {
    return StridesOf(layout, num_pages, pools.page_size, num_kv_heads, head_dim);
  };
  // Bytes in front of the first value; a pool without pages has no memory to point into.
  const bool behind_key = layout == PageLayout::kInterleaved && pools.num_v_pages > 0;
  const int64_t first_value = behind_key ? head_dim * ByteWidth(pools.dtype) : 0;
  *problem = {q_dtype,   pools.dtype,     num_rows,          num_q_heads,       num_kv_heads,
              head_dim,  pools.page_size, pools.num_k_pages, pools.num_v_pages, num_seqs,
              max_pages, sinks.dim(0),    k_scale.dim(0),    v_scale.dim(0),    layout};
  *params = {q.buffer.untyped_data(),
             k_pages.buffer.untyped_data(),
             static_cast<const char*>(v_pages.buffer.untyped_data()) + first_value,
             static_cast<const int32_t*>(block_tables.buffer.untyped_data()),
             static_cast<const int32_t*>(kv_lens.buffer.untyped_data()),
             attributes.decode ? nullptr : static_cast<const int32_t*>(q_starts.buffer.untyped_data()),
             attributes.decode ? nullptr : static_cast<const int32_t*>(q_counts.buffer.untyped_data()),
             DataOrNull<const float>(sinks),
             DataOrNull<const float>(k_scale),
             DataOrNull<const float>(v_scale),
             out.buffer.untyped_data(),
             static_cast<float*>(lse.buffer.untyped_data()),
             static_cast<float*>(workspace.buffer.untyped_data()),
             strides_of(pools.num_k_pages),
             strides_of(pools.num_v_pages),
             attributes.scale,
             attributes.soft_cap,
             attributes.sliding_window,
             attributes.causal};
  return Status::Ok();
}

struct WriteBuffers {
  NamedBuffer k_pages, v_pages, k, v, slot_mapping, k_scale, v_scale;
  NamedBuffer k_pages_out, v_pages_out;  // the first two again
};

inline Status ParseWrite(const WriteBuffers& buffers, WriteProblem* problem, WriteParams* params) {
  const auto& [k_pages, v_pages, k, v, slot_mapping, k_scale, v_scale, k_pages_out, v_pages_out] = buffers;

  DType new_dtype{};
  Pools pools{};
  if (Status s = ParsePages(k_pages, v_pages, PageLayout::kSplit, &pools); !s.ok()) return s;
  const auto [kv_dtype, num_pages, num_v_pages, page_size, num_kv_heads, head_dim] = pools;
  if (num_v_pages != num_pages)
    return Mismatch(v_pages, "as many pages as k_pages, " + std::to_string(num_pages));
  if (Status s = ParseFloating(k, &new_dtype); !s.ok()) return s;
  if (Status s = ExpectRank(k, 3, "[T, K, H]"); !s.ok()) return s;
  const int64_t num_tokens = k.dim(0);
  for (const NamedBuffer& rows : {k, v}) {
    if (Status s = Expect(rows, k.buffer.element_type(), {num_tokens, num_kv_heads, head_dim}); !s.ok())
      return s;
  }
  if (Status s = Expect(slot_mapping, ffi::DataType::S32, {num_tokens}); !s.ok()) return s;
  for (const NamedBuffer& scale : {k_scale, v_scale}) {
    if (Status s = ExpectRepeated(scale, num_kv_heads, num_tokens, "T"); !s.ok()) return s;
  }
  for (const NamedBuffer& pages : {k_pages_out, v_pages_out}) {
    if (Status s =
            Expect(pages, k_pages.buffer.element_type(), {num_pages, page_size, num_kv_heads, head_dim});
        !s.ok()) {
      return s;
    }
  }
  // The call is made with both pools aliased; anything else would return pages with only the new tokens in
  // them.
  if (k_pages_out.buffer.untyped_data() != k_pages.buffer.untyped_data() ||
      v_pages_out.buffer.untyped_data() != v_pages.buffer.untyped_data()) {
    return Status::InvalidArgument(
        "k_pages, v_pages: expected results aliased to these operands, got others");
  }

  const PageStrides strides = StridesOf(PageLayout::kSplit, num_pages, page_size, num_kv_heads, head_dim);
  *problem = {new_dtype, kv_dtype,  num_tokens,     num_kv_heads,  head_dim,
              page_size, num_pages, k_scale.dim(0), v_scale.dim(0)};
  *params = {k.buffer.untyped_data(),
             v.buffer.untyped_data(),
             static_cast<const int32_t*>(slot_mapping.buffer.untyped_data()),
             DataOrNull<const float>(k_scale),
             DataOrNull<const float>(v_scale),
             k_pages_out.buffer.untyped_data(),
             v_pages_out.buffer.untyped_data(),
             strides,
             strides};
  return Status::Ok();
}

}  // namespace jpa
