// Operands of mma.sync m16n8k16 from rows of keys and values in shared memory, and of queries in global
// memory. 8-bit rows become f16 on the way, exactly. The order in which a product takes the elements of a row
// is free as long as both of its operands keep to it, and 8-bit rows use that: a lane's four neighbouring
// bytes are its four elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/problem.h"
#include "device/convert.cuh"
#include "device/ptx.cuh"

namespace jpa::device {

// Two numbers as two neighbouring elements of f16 or bf16.
template <typename T>
__device__ inline uint32_t PackPair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

// Columns [16 block, 16 block + 16) of an MMA's result, which is laid out as the first operand of the next
// one.
template <typename T, int count>
__device__ inline void PackOperand(const float (&result)[count], int block, uint32_t (&operand)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    operand[j] = PackPair<T>(result[8 * block + 2 * j], result[8 * block + 2 * j + 1]);
}

// Bytes `low` and `high` of a word of 8-bit values, as f16.
template <DType dtype, int low, int high>
__device__ inline uint32_t PairOfBytes(uint32_t word) {
  uint32_t bits;
  if constexpr (dtype == DType::kE5M2) {
    // f16 is e5m2 with eight more bits.
    bits = PermuteBytes(0, word, (4 + low) << 4 | (4 + high) << 12);
  } else if constexpr (dtype == DType::kS8) {
    // 0x6400 is 1024 and the last ten bits count from there; the sign bit flipped makes it value + 128.
    const uint32_t offset = PermuteBytes(word ^ 0x80808080u, 0x64646464u, low | 4 << 4 | high << 8 | 4 << 12);
    __half2 pair;
    memcpy(&pair, &offset, sizeof pair);
    pair = __hsub2(pair, __half2half2(__ushort_as_half(0x6480)));
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const uint32_t pair = low == 0 && high == 1 ? word : PermuteBytes(word, 0, low | high << 4);
    const __half2_raw halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair & 0xffffu), __NV_E4M3);
    memcpy(&bits, &halves, sizeof bits);
  }
  return bits;
}

// Keys of a load: ldmatrix takes 32 chunks, and 16 elements of a row fill two of them, or one with 8 bits.
template <DType dtype>
inline constexpr int kKeysPerLoad = ByteWidth(dtype) == 1 ? 32 : 16;

// Where the row is whose chunks a lane gives ldmatrix, in bytes from the first of kKeysPerLoad keys. The
// number of that key in its tile is a multiple of 8, and the tile's address one of 128.
template <DType dtype, typename Rows>
__device__ inline uint32_t LaneRowOfKeys() {
  const uint32_t lane = LaneId();
  return ByteWidth(dtype) == 1 ? Rows::Offset(lane, 0)
                               : Rows::Chunk(Rows::Offset(lane / 16 * 8 + lane % 8, 0), lane / 8 % 2);
}

// Likewise for values; with 8-bit rows it is the same place.
template <DType dtype, typename Rows>
__device__ inline uint32_t LaneRowOfValues() {
  const uint32_t lane = LaneId();
  return ByteWidth(dtype) == 1 ? Rows::Offset(lane, 0) : Rows::Chunk(Rows::Offset(lane % 16, 0), lane / 16);
}

// Elements [16 i, 16 i + 16) of kKeysPerLoad keys' rows as second operand of Q K^T: a fragment per eight
// keys. `row` is the address of the lane's row (LaneRowOfKeys).
template <DType dtype, typename Rows>
__device__ inline void LoadKeys(uint32_t row, int i, uint32_t (&fragments)[kKeysPerLoad<dtype> / 8][2]) {
  uint32_t words[4];
  if constexpr (ByteWidth(dtype) == 2) {
    Ldmatrix(Rows::Chunk(row, 2 * i), words);
#pragma unroll
    for (int t = 0; t < 4; ++t) fragments[t / 2][t % 2] = words[t];
  } else {
    Ldmatrix(Rows::Chunk(row, i), words);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      fragments[t][0] = PairOfBytes<dtype, 0, 1>(words[t]);
      fragments[t][1] = PairOfBytes<dtype, 2, 3>(words[t]);
    }
  }
}

// Columns [16 i, 16 i + 16) of kKeysPerLoad keys' rows as second operand of P V: a fragment per 16 keys, of
// which [0..1] has eight columns and [2..3] the others; FragmentLayout says which. `row` is the address of
// the lane's row (LaneRowOfValues).
template <DType dtype, typename Rows>
__device__ inline void LoadValues(uint32_t row, int i, uint32_t (&fragments)[kKeysPerLoad<dtype> / 16][4]) {
  if constexpr (ByteWidth(dtype) == 2) {
    LdmatrixTransposed(Rows::Chunk(row, 2 * i), fragments[0]);
  } else {
    uint32_t words[4];
    // Pairs of columns change places with keys: a word has two columns of two keys.
    LdmatrixTransposed(Rows::Chunk(row, i), words);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      fragments[t / 2][t % 2] = PairOfBytes<dtype, 0, 2>(words[t]);
      fragments[t / 2][2 + t % 2] = PairOfBytes<dtype, 1, 3>(words[t]);
    }
  }
}

// Which columns a lane has in a row of two neighbouring blocks of eight (i even) of P V's result.
template <bool is_8bit>
struct FragmentLayout;

// Two columns from Column(i) on, and two from Column(i) + 8 on.
template <>
struct FragmentLayout<false> {
  static constexpr int kNeighbours = 2;
  __device__ static int Column(int i) { return 8 * i + static_cast<int>(LaneId() % 4) * 2; }
  __device__ static float4 Neighbours(float a0, float a1, float b0, float b1) { return {a0, a1, b0, b1}; }
};

// Four columns from Column(i) on: the even ones are in the first block.
template <>
struct FragmentLayout<true> {
  static constexpr int kNeighbours = 4;
  __device__ static int Column(int i) { return 8 * i + static_cast<int>(LaneId() % 4) * 4; }
  __device__ static float4 Neighbours(float a0, float a1, float b0, float b1) { return {a0, b0, a1, b1}; }
};

// 2^exponent, for exponents of normal numbers.
__device__ inline float PowerOfTwo(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Queries become f16 beside 8-bit keys, and their range is smaller than bf16's: so a row is divided by a
// power of two near its largest element.
class QueryScale {
 public:
  __device__ explicit QueryScale(float largest) {
    exponent_ = (__float_as_int(largest) >> 23) - 127;
    // In two steps: 2^-exponent itself may be no normal number.
    first_ = PowerOfTwo(-exponent_ / 2);
    second_ = PowerOfTwo(-exponent_ + exponent_ / 2);
  }

  __device__ int exponent() const { return exponent_; }
  __device__ float operator()(float value) const { return value * first_ * second_; }

 private:
  int exponent_;
  float first_, second_;
};

// 16 queries as first operand of Q K^T, two rows per lane.
template <DType q_dtype, bool is_8bit, int head_dim>
struct QueryFragments {
  uint32_t fragments[head_dim / 16][4];

  // Row r of no lane has a query.
  __device__ void ClearRow(int r) {
#pragma unroll
    for (auto& fragment : fragments) fragment[r] = fragment[2 + r] = 0;
  }

  // Row r (0 or 1) of the lane, zeros without a query. Returns the exponent of the power of two that it was
  // divided by. All lanes of a row come here.
  __device__ int LoadRow(int r, const uint16_t* query) {
    const int lane = static_cast<int>(LaneId() % 4);
    if constexpr (!is_8bit) {
#pragma unroll
      for (int i = 0; i < head_dim / 16; ++i) {
        const auto* pairs = reinterpret_cast<const uint32_t*>(query + 16 * i + 2 * lane);
        fragments[i][r] = query == nullptr ? 0 : pairs[0];
        fragments[i][2 + r] = query == nullptr ? 0 : pairs[4];
      }
      return 0;
    } else {
      using T = TypeOf<q_dtype>;
      uint2 words[head_dim / 16];
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < head_dim / 16; ++i) {
        words[i] =
            query == nullptr ? uint2{0, 0} : *reinterpret_cast<const uint2*>(query + 16 * i + 4 * lane);
        const Unpacked<T, 4> values = Unpack<T, 4>(words[i]);
#pragma unroll
        for (const T& value : values.values) largest = fmaxf(largest, fabsf(ToF32(value)));
      }
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const QueryScale scale(largest);
#pragma unroll
      for (int i = 0; i < head_dim / 16; ++i) {
        const Unpacked<T, 4> values = Unpack<T, 4>(words[i]);
        float scaled[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) scaled[j] = scale(ToF32(values.values[j]));
        fragments[i][r] = PackPair<__half>(scaled[0], scaled[1]);
        fragments[i][2 + r] = PackPair<__half>(scaled[2], scaled[3]);
      }
      return scale.exponent();
    }
  }
};

}  // namespace jpa::device
