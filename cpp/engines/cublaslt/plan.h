// How a call is cut into batched matrix products, and where everything lies in the workspace. A function of
// static sizes alone: the same launches are made whatever lengths and tables hold.
//
// - row tile: R query rows of one sequence; one row in decode
// - row block: a row tile and a key/value head, one query matrix of R * G rows (G = N / K), row r * G + g
// - key block: keys of one matrix product: a page where pages are read in place, else some gathered keys
// - segment: key blocks of one row that share a maximum, the reach of one softmax
// - group: row blocks whose queries, gathered keys and partial results are in the workspace at one time
// - chunk: row blocks of a group whose scores are
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

// The query rows of a row tile and the keys that they see, made on the device.
struct RowTile {
  int32_t seq;
  int32_t row;       // first of its rows in q
  int32_t num_rows;  // 0: a dead row tile
  int32_t position;  // of its first row in the sequence
  int32_t begin;     // keys [begin, end) are seen by some of its rows
  int32_t end;
  int32_t kv_len;
};

// A row block of a group, for the kernels that come after packing.
struct RowBlock {
  RowTile tile;
  int32_t row_tile_index;  // num_row_tiles or more: there is no such row block
  int32_t head;
  int32_t owner;         // the row block of the group that gathers the keys which this one uses
  int32_t gather_index;  // of their copy
  int32_t live_begin;  // tile.begin and tile.end, outwards to whole key blocks: all that is ever read of the
                       // row block's results
  int32_t live_end;
};

struct Plan {
  bool in_place;           // pages are read where they lie, else gathered first
  bool decode;             // row tile t is row t of sequence t
  int64_t tile_rows;       // R
  int64_t row_block_rows;  // R * G
  int64_t head_dim;        // H, rounded up to what 16-byte accesses divide
  int64_t value_dim;       // Hv, likewise
  int64_t key_token;       // elements from one key to the next of a matrix
  int64_t value_token;     // likewise of values
  int64_t num_row_tiles;   // as many as there can be
  int64_t block_keys;
  int64_t key_blocks_per_segment;
  int64_t segments;  // of a stretch
  int64_t stretches;
  int64_t row_blocks;  // of a group, a multiple of chunk_row_blocks
  int64_t groups;
  int64_t chunk_row_blocks;
  int64_t all_chunks;  // that have a row block, of all groups together: the last group may need fewer
  int64_t gathered;    // copies of keys and values in a group: row tiles of one sequence share one per head
  // In place: of a copied page of values. Products know one stride of its tokens, that of the pool.
  PageStrides copies;

  // Bytes from the start of the workspace, multiples of 256.
  int64_t row_tiles;          // RowTile [num_row_tiles]
  int64_t row_tile_starts;    // int32 [B + 1]: the first row tile of each sequence
  int64_t zeros;              // one block of keys, or of values, of q's dtype
  int64_t row_block_records;  // RowBlock [row blocks]
  int64_t queries;            // [row blocks, row_block_rows, head_dim] of q's dtype
  int64_t keys;               // gathered: [gathered, stretch_keys, head_dim] of q's dtype
  int64_t values;  // gathered: [gathered, stretch_keys, value_dim], or the keys, if they hold the values; in
                   // place: copies of last pages, [row blocks / K] through `copies`
  int64_t key_scales;  // f32 [gathered, stretch_keys], if keys have scales per token
  int64_t known;  // a bit per key, [gathered, stretch_keys / 8] bytes: whether the block table names its page
  int64_t scores;    // f32 [chunk_row_blocks, row_block_rows, stretch_keys]; probabilities of q's dtype take
                     // their place
  int64_t stats;     // float2 [row blocks, row_block_rows, segments]: maximum and sum
  int64_t partials;  // f32 [row blocks, key blocks, row_block_rows, value_dim]
  int64_t pointers;  // void* [kPointerArrays, row blocks, key blocks]
  int64_t states;    // f32 [row blocks, row_block_rows, value_dim + 2] between stretches
  int64_t gemm;      // kGemmWorkspaceBytes
  int64_t workspace_bytes;

  constexpr int64_t segment_keys() const { return key_blocks_per_segment * block_keys; }
  constexpr int64_t key_blocks() const { return segments * key_blocks_per_segment; }
  constexpr int64_t stretch_keys() const { return segments * segment_keys(); }
  constexpr int64_t chunks() const { return row_blocks / chunk_row_blocks; }
  // Matrices of a product.
  constexpr int64_t batch() const { return chunk_row_blocks * key_blocks(); }
  constexpr int64_t chunks_of(int64_t group) const {
    return group == groups - 1 ? all_chunks - group * chunks() : chunks();
  }
  // cut (ragged only); then for each group and stretch pack, for each chunk QK^T, softmax and PV, and
  // combine.
  constexpr int64_t launches() const { return (decode ? 0 : 1) + stretches * (2 * groups + 3 * all_chunks); }
};

// The arrays of pointers, one entry per row block and key block of the group, in this order.
enum PointerArray { kKeys, kQueries, kScores, kValues, kProbabilities, kPartials, kPointerArrays };

// Needs K, H, Hv, S >= 1 and N a multiple of K. Keeps the workspace within `workspace_limit` plus what grows
// with rows and sequences only, as long as the smallest group fits there.
Plan MakePlan(const AttentionProblem& problem, bool decode, int64_t workspace_limit);

// At least MakePlan(...).workspace_bytes of the same problem with any T, B and M, less
// kWorkspaceBytesPerRow * (T + B): what a call with symbolic sizes asks for.
int64_t WorkspaceBound(const AttentionProblem& problem, int64_t workspace_limit);
inline constexpr int64_t kWorkspaceBytesPerRow = sizeof(RowTile) + sizeof(int32_t);

}  // namespace jpa::cublaslt
