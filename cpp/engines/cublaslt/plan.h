// How a call is cut into batched matrix products, and where everything lies in the workspace. A function of
// static sizes alone: the same launches are made whatever lengths and tables hold.
//
// - tile: R query rows of one sequence; decode has one row a tile
// - unit: a tile and a key/value head, one query matrix of R * G rows (G = N / K), row r * G + g
// - block: keys of one matrix product: a page where pages are read in place, else a stretch of gathered keys
// - segment: blocks of one row that share a maximum, the reach of one softmax
// - group: units whose queries, gathered keys and partial results are in the workspace at one time
// - chunk: units of a group whose scores are
// - stretch: keys of all these at one time, all there are if they fit
#pragma once

#include <cstdint>

#include "core/params.h"
#include "core/problem.h"

namespace jpa::cublaslt {

inline constexpr int64_t kDefaultWorkspaceLimit = int64_t{256} << 20;

// Scratch that cuBLASLt's own kernels may use.
inline constexpr int64_t kGemmWorkspaceBytes = int64_t{4} << 20;

// The longest segment: its softmax keeps a row in the registers of one thread block.
inline constexpr int64_t kMaxSegmentKeys = 4096;

// The query rows of a tile and what they see, made on the device.
struct Tile {
  int32_t seq;
  int32_t row;       // first of its rows in q
  int32_t num_rows;  // 0: a dead tile
  int32_t position;  // of its first row in the sequence
  int32_t begin;     // keys [begin, end) are seen by some of its rows
  int32_t end;
  int32_t kv_len;
};

// A unit of a group, for the kernels that come after packing.
struct Unit {
  Tile tile;
  int32_t tile_index;  // num_tiles or more: there is no such unit
  int32_t head;
  int32_t owner;       // the unit of the group that gathers the keys which this one uses
  int32_t slot;        // where these are
  int32_t live_begin;  // tile.begin and tile.end, outwards to whole blocks: all that is ever read of the
                       // unit's results
  int32_t live_end;
};

struct Plan {
  bool in_place;          // pages are read where they lie, else gathered first
  bool decode;            // tile t is row t of sequence t
  int64_t rows_per_tile;  // R
  int64_t unit_rows;      // R * G
  int64_t head_dim;       // H, rounded up to what 16-byte accesses divide
  int64_t num_tiles;      // as many as there can be
  int64_t block_keys;
  int64_t blocks_per_segment;
  int64_t segments;  // of a stretch
  int64_t stretches;
  int64_t units;  // of a group, a multiple of chunk_units
  int64_t groups;
  int64_t chunk_units;
  int64_t all_chunks;  // that have a unit, of all groups together: the last group may need fewer
  int64_t slots;  // of gathered keys and values in a group: tiles of one sequence share one for each head
  // In place: of a copied page of values. Products know one stride of tokens, that of the pools.
  PageStrides copies;

  // Bytes from the start of the workspace, multiples of 256.
  int64_t tiles;         // Tile [num_tiles]
  int64_t tile_starts;   // int32 [B + 1]: the first tile of each sequence
  int64_t zeros;         // one block of keys of q's dtype
  int64_t unit_records;  // Unit [units]
  int64_t queries;       // [units, unit_rows, head_dim] of q's dtype
  int64_t keys;          // gathered: [slots, stretch_keys, head_dim] of q's dtype
  int64_t values;        // gathered: likewise; in place: copies of last pages, [units / K] through `copies`
  int64_t known;   // a bit a key, [slots, stretch_keys / 8] bytes: whether the block table names its page
  int64_t scores;  // f32 [chunk_units, unit_rows, stretch_keys]; probabilities of q's dtype take their place
  int64_t stats;   // float2 [units, unit_rows, segments]: maximum and sum
  int64_t partials;  // f32 [units, blocks, unit_rows, head_dim]
  int64_t pointers;  // void* [kPointerArrays, units, blocks]
  int64_t states;    // f32 [units, unit_rows, head_dim + 2] between stretches
  int64_t gemm;      // kGemmWorkspaceBytes
  int64_t workspace_bytes;

  constexpr int64_t segment_keys() const { return blocks_per_segment * block_keys; }
  constexpr int64_t blocks() const { return segments * blocks_per_segment; }
  constexpr int64_t stretch_keys() const { return segments * segment_keys(); }
  constexpr int64_t chunks() const { return units / chunk_units; }
  // Matrices of a product.
  constexpr int64_t batch() const { return chunk_units * blocks(); }
  constexpr int64_t chunks_of(int64_t group) const {
    return group == groups - 1 ? all_chunks - group * chunks() : chunks();
  }
  // cut (ragged only); then for each group and stretch pack, for each chunk QK^T, softmax and PV, and
  // combine.
  constexpr int64_t launches() const { return (decode ? 0 : 1) + stretches * (2 * groups + 3 * all_chunks); }
};

// The arrays of pointers, one entry a unit and block of the group, in this order.
enum PointerArray { kKeys, kQueries, kScores, kValues, kProbabilities, kPartials, kPointerArrays };

// Needs K, H, S >= 1 and N a multiple of K. Keeps the workspace within `workspace_limit` plus what grows with
// rows and sequences only, as long as the smallest group fits there.
Plan MakePlan(const AttentionProblem& problem, bool decode, int64_t workspace_limit);

// At least MakePlan(...).workspace_bytes of the same problem with any T, B and M, less
// kWorkspaceBytesPerRow * (T + B): what a call with symbolic sizes asks for.
int64_t WorkspaceBound(const AttentionProblem& problem, int64_t workspace_limit);
inline constexpr int64_t kWorkspaceBytesPerRow = sizeof(Tile) + sizeof(int32_t);

}  // namespace jpa::cublaslt
