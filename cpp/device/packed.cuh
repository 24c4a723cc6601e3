// Several neighbouring values as one access to memory, and one block of registers until they are unpacked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jpa::device {

// The unsigned words that hold so many bytes.
template <int bytes>
struct WordsImpl;
template <>
struct WordsImpl<1> {
  using Type = uint8_t;
};
template <>
struct WordsImpl<2> {
  using Type = uint16_t;
};
template <>
struct WordsImpl<4> {
  using Type = uint32_t;
};
template <>
struct WordsImpl<8> {
  using Type = uint2;
};
template <>
struct WordsImpl<16> {
  using Type = uint4;
};
// Two accesses: 16 bytes are the most that a thread can make at once.
template <>
struct WordsImpl<32> {
  struct Type {
    uint4 low, high;
  };
};

// n values of type T, as words: the compiler would keep an array of 16-bit values in a register each.
template <typename T, int n>
using Packed = typename WordsImpl<n* static_cast<int>(sizeof(T))>::Type;

template <typename T, int n>
struct Unpacked {
  T values[n];
};

template <int n, typename T>
__device__ inline Packed<T, n> LoadPacked(const T* from) {
  return *reinterpret_cast<const Packed<T, n>*>(from);
}

template <int n, typename T>
__device__ inline void StorePacked(T* to, const Packed<T, n>& packed) {
  *reinterpret_cast<Packed<T, n>*>(to) = packed;
}

template <typename T, int n>
__device__ inline Unpacked<T, n> Unpack(const Packed<T, n>& packed) {
  Unpacked<T, n> unpacked;
  memcpy(&unpacked, &packed, sizeof packed);
  return unpacked;
}

template <typename T, int n>
__device__ inline Packed<T, n> Pack(const Unpacked<T, n>& unpacked) {
  Packed<T, n> packed;
  memcpy(&packed, &unpacked, sizeof packed);
  return packed;
}

}  // namespace jpa::device
