// Which tokens of a call stay: of equal slots the last one, found by a CTA for its own tokens alone, so that
// no two CTAs write the same bytes and none waits for another.
#pragma once

#include <cstdint>

namespace jpa::cache {

// A multiprocessor runs so many threads: in one CTA, whose many warps share what it learns about slots, or in
// small ones of one token each, which are done sooner.
constexpr int kThreadsPerSm = 1024;

constexpr int kTileTokens = kThreadsPerSm;  // tokens that a CTA resolves at a time, at most
constexpr int kSlotLoads = 8;               // later slots that a thread has in flight

// The slot of every token of the call.
struct SlotMapping {
  const int32_t* slots;  // [T]
  int64_t num_slots;     // P * S
  int32_t num_tokens;    // T

  __device__ bool InPool(int32_t slot) const { return slot >= 0 && slot < num_slots; }
};

// The slots of a token tile's tokens, each with the last token that has it: a hash table in shared memory.
class LastTokens {
 public:
  struct Storage {
    int32_t slots[4 * kTileTokens];
    int32_t tokens[4 * kTileTokens];
  };

  // At least four entries per token, so that probing is short.
  __device__ LastTokens(Storage& storage, int count)
      : slots_(storage.slots), tokens_(storage.tokens), log_entries_(LogEntries(count)) {}

  __device__ void Clear() {
    for (int i = static_cast<int>(threadIdx.x); i <= Mask(); i += static_cast<int>(blockDim.x)) {
      slots_[i] = kNone;
      tokens_[i] = kNone;
    }
  }

  __device__ void Insert(int32_t slot, int32_t token) {
    int i = FirstEntry(slot);
    for (int32_t found; (found = atomicCAS(&slots_[i], kNone, slot)) != kNone && found != slot;) i = Next(i);
    atomicMax(&tokens_[i], token);
  }

  // Notes a token of any slot, once all insertions are done.
  __device__ void Observe(int32_t slot, int32_t token) {
    if (const int i = Find(slot); slots_[i] == slot) atomicMax(&tokens_[i], token);
  }

  __device__ bool IsLast(int32_t slot, int32_t token) const { return tokens_[Find(slot)] == token; }

 private:
  static constexpr int kNone = -1;

  __device__ static int LogEntries(int count) { return 32 - __clz(4 * count - 1); }

  // Multiplicative (Fibonacci) hashing: neighbouring slots land far apart.
  __device__ int FirstEntry(int32_t slot) const {
    return static_cast<int>((static_cast<uint32_t>(slot) * 0x9e3779b1u) >> (32 - log_entries_));
  }
  __device__ int Next(int i) const { return (i + 1) & Mask(); }
  __device__ int Mask() const { return (1 << log_entries_) - 1; }

  // The entry of the slot, or the empty one where its search ends.
  __device__ int Find(int32_t slot) const {
    int i = FirstEntry(slot);
    while (slots_[i] != slot && slots_[i] != kNone) i = Next(i);
    return i;
  }

  int32_t* const slots_;
  int32_t* const tokens_;
  const int log_entries_;
};

// Slots that a thread reads at a time, from token `first` on; -1 past the end.
struct SomeSlots {
  __device__ SomeSlots(const SlotMapping& mapping, int64_t first) {
#pragma unroll
    for (int i = 0; i < kSlotLoads; ++i) {
      const int64_t token = first + i * blockDim.x + threadIdx.x;
      slots[i] = token < mapping.num_tokens ? mapping.slots[token] : -1;
    }
  }

  int32_t slots[kSlotLoads];
};

// Sets targets[i] to the slot of token first + i if its value stays there, else to -1, for up to blockDim.x
// tokens. Ends with a barrier.
__device__ inline void ResolveTokenTile(const SlotMapping& mapping, int32_t first, int count,
                                        LastTokens::Storage& storage, int32_t* targets) {
  const int mine = static_cast<int>(threadIdx.x);  // the thread's token of the tile
  LastTokens last_tokens(storage, count);
  int32_t slot = -1;
  if (mine < count) slot = mapping.slots[first + mine];
  if (!mapping.InPool(slot)) slot = -1;
  int64_t next = int64_t{first} + count;
  SomeSlots later(mapping, next);  // already on their way while the table is made

  last_tokens.Clear();
  __syncthreads();
  if (slot >= 0) last_tokens.Insert(slot, first + mine);
  __syncthreads();
  while (next < mapping.num_tokens) {
    const int64_t current = next;
    next += kSlotLoads * blockDim.x;
    const SomeSlots after(mapping, next);
#pragma unroll
    for (int i = 0; i < kSlotLoads; ++i) {
      if (later.slots[i] < 0) continue;
      last_tokens.Observe(later.slots[i], static_cast<int32_t>(current + i * blockDim.x + threadIdx.x));
    }
    later = after;
  }
  __syncthreads();
  if (mine < count) targets[mine] = slot >= 0 && last_tokens.IsLast(slot, first + mine) ? slot : -1;
  __syncthreads();
}

}  // namespace jpa::cache
