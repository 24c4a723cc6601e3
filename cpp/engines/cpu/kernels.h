// The kernels as run.cc sees them: one table of functions for each instruction set.
//
// kernels_*.cc compile the same headers (simd.h, keys.h, decode.h, prefill.h) for different instruction sets.
// All that they define sits in a namespace named after the set, and they use no library templates: were two
// copies of an inline function to carry one name, the linker could hand AVX-512 code to a machine without it.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "core/problem.h"

namespace jpa::cpu {

// Work tiles with at most this many packed rows take the decode kernel, all others the prefill kernel.
inline constexpr int64_t kMaxDecodeRows = 16;
// The most packed rows times key/value heads in a tile of the decode kernel.
inline constexpr int64_t kMaxDecodeStates = 256;
// The most packed rows in a tile of the prefill kernel, which takes one key/value head at a time.
inline constexpr int64_t kMaxPrefillRows = 96;

// The work of one call of a kernel. A sequence's queries are packed: packed row p of key/value head h is
// query row p / group and query head h * group + p % group, so that rows of a group share the keys they load.
struct WorkTile {
  int64_t seq;
  int64_t kv_len;
  int64_t q_start;     // query row 0 of the sequence is row q_start of q
  int64_t q_position;  // and stands at this position
  int64_t row_begin;   // packed rows [row_begin, row_end)
  int64_t row_end;
  int64_t head_begin;  // key/value heads [head_begin, head_end)
  int64_t head_end;
  int64_t key_begin;  // keys [key_begin, key_end), those that some row of the tile sees
  int64_t key_end;
  int64_t split;  // index of this range of keys among `num_splits`
  int64_t num_splits;
};

struct Kernels {
  const char* name;

  // Scratch that `attend` and `merge` need, in bytes, at 64-byte alignment.
  int64_t (*scratch_bytes)(const AttentionProblem& problem);

  // Attends a tile. With one split the result goes to out and lse, otherwise a partial state to the
  // workspace.
  void (*attend)(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                 void* scratch);

  // Merges the partial states of a tile's rows and heads in split order, into out and lse.
  void (*merge)(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                void* scratch);
};

namespace baseline {
const Kernels& GetKernels();
}
#ifdef JPA_HAVE_X86_KERNELS
namespace avx2 {
const Kernels& GetKernels();
}
namespace avx512 {
const Kernels& GetKernels();
}
#endif

}  // namespace jpa::cpu
