#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/dtype_name.h"
#include "device/compiled_for.h"
#include "engines/fused/args.h"
#include "engines/fused/decode/combine.h"
#include "engines/fused/decode/kernels.h"
#include "engines/fused/decode/traits.h"
#include "engines/fused/head_dims.h"
#include "engines/fused/prefill/kernels.h"
#include "engines/fused/prefill/tensor_map.h"
#include "engines/fused/run.h"

namespace jpa::fused {
namespace {

#ifdef JPA_HAVE_SM90A
constexpr int kPrefillCapability = 90;  // that the prefill kernels are compiled for
#else
constexpr int kPrefillCapability = 0;
#endif
constexpr int64_t kAlign = 256;
constexpr int64_t kBytesPerElement = 2;  // where prefill multiplies, whatever pages have
constexpr float kLog2E = 1.4426950408889634f;

int64_t RoundUp(int64_t bytes) { return CeilDiv(bytes, kAlign) * kAlign; }

// What `use` makes of the head dim as a constant, if it is one of those listed; otherwise nothing.
template <int... head_dims, typename Use>
auto ForHeadDim(std::integer_sequence<int, head_dims...>, int64_t head_dim, const Use& use) {
  std::common_type_t<decltype(use(std::integral_constant<int, head_dims>()))...> made{};
  ((head_dim == head_dims ? void(made = use(std::integral_constant<int, head_dims>())) : void()), ...);
  return made;
}

DecodeKernelInfo KernelFor(const AttentionProblem& problem) {
  return ForHeadDim(DecodeHeadDims(), problem.head_dim, [&](auto head_dim) {
    return DecodeKernelOf<head_dim()>(problem.q_dtype, problem.kv_dtype);
  });
}

template <Loader loader>
PrefillKernelInfo PrefillKernelFor(const AttentionProblem& problem) {
  return ForHeadDim(PrefillHeadDims(), problem.head_dim, [&](auto head_dim) {
    return PrefillKernelOf<head_dim(), loader>(problem.q_dtype, problem.kv_dtype);
  });
}

// Where each array lies in the workspace.
struct Layout {
  int64_t rows_each;
  int64_t num_states;
  // Bytes from the start; the sums of values come first.
  int64_t stats;
  int64_t prefill;
  int64_t bytes;
};

// Where each array of prefill lies, in bytes from its start. The partial results come first.
struct PrefillLayout {
  int64_t stats;
  int64_t arrivals;
  int64_t plan;
  int64_t planned;
  int64_t cache_states;
  int64_t tile_cache;
  int64_t bytes;
};

static_assert(sizeof(PlannedSequence) == kWorkspaceBytesPerSequence);

// Images of tiles that scratch memory may have at most. Pages that come in boxes need none.
int64_t MaxCachedTiles(const AttentionProblem& problem, const Options& options) {
  const int64_t bytes = PrefillKernelFor<Loader::kCpAsync>(problem).cached_tile_bytes;
  if (kPrefillCapability == 0 || options.decode || FitsTma(problem) || bytes == 0) return 0;
  return options.workspace_limit / 2 / bytes;
}

// Of these, as many as tiles of the call can have one.
int64_t CachedTilesOf(const AttentionProblem& problem, const Options& options) {
  const int64_t most = MaxCachedTiles(problem, options);
  if (most == 0) return 0;
  const TileShape shape = PrefillKernelFor<Loader::kCpAsync>(problem).shape;
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  if (CeilDiv(problem.num_rows * group, shape.rows) < kMinRowTilesForCache) return 0;
  const int64_t of_sequence = CeilDiv(problem.max_pages * problem.page_size, shape.keys);
  return std::min(most, problem.num_seqs * of_sequence * problem.num_kv_heads);
}

int64_t CacheStateBytes(const PrefillKernelInfo& kernel, int64_t num_cached_tiles) {
  return RoundUp(num_cached_tiles * kernel.cache_slices * static_cast<int64_t>(sizeof(uint32_t)));
}

PrefillLayout LayOutPrefill(const AttentionProblem& problem, const Options& options,
                            int64_t num_cached_tiles) {
  if (options.decode) return {};
  constexpr int64_t kRows = 192;  // of a tile of any prefill kernel, at most
  const int64_t num_states = options.batch_invariant ? 0 : kMaxPartials * kRows;
  PrefillLayout layout{};
  layout.stats = RoundUp(num_states * problem.head_dim * static_cast<int64_t>(sizeof(float)));
  layout.arrivals = layout.stats + RoundUp(num_states * static_cast<int64_t>(sizeof(float2)));
  layout.plan = layout.arrivals + RoundUp(kMaxPartials * static_cast<int64_t>(sizeof(uint32_t)));
  layout.planned = layout.plan + RoundUp(static_cast<int64_t>(sizeof(PrefillPlan)));
  layout.cache_states = layout.planned + RoundUp(problem.num_seqs * kWorkspaceBytesPerSequence);
  const PrefillKernelInfo kernel = PrefillKernelFor<Loader::kCpAsync>(problem);
  layout.tile_cache = layout.cache_states + CacheStateBytes(kernel, num_cached_tiles);
  layout.bytes = layout.tile_cache + num_cached_tiles * kernel.cached_tile_bytes;
  return layout;
}

// Query rows of sequences that may be split, at most.
int64_t MaxSplitRows(const AttentionProblem& problem, bool decode) {
  return decode ? problem.num_rows : std::min(problem.num_rows, kMaxSplitRows * problem.num_seqs);
}

Layout LayOut(const AttentionProblem& problem, const Options& options, int64_t num_cached_tiles) {
  Layout layout{};
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  layout.rows_each = options.decode ? std::min<int64_t>(group, kTileRows) : kTileRows;
  layout.num_states = options.batch_invariant
                          ? MaxSplitRows(problem, options.decode) * problem.num_q_heads * kMaxSplits
                          : 2 * kMaxCtas * layout.rows_each;
  layout.stats = RoundUp(layout.num_states * problem.head_dim * static_cast<int64_t>(sizeof(float)));
  layout.prefill = layout.stats + RoundUp(layout.num_states * static_cast<int64_t>(sizeof(float2)));
  // XLA aligns less than 256 bytes on some devices.
  layout.bytes = layout.prefill + LayOutPrefill(problem, options, num_cached_tiles).bytes + kAlign;
  return layout;
}

// Of the images that the call asks for, as many as there is room for: a program that was kept may have the
// workspace of its time. `room` is in bytes.
int64_t CachedTilesThatFit(const AttentionProblem& problem, const Options& options, int64_t room) {
  int64_t tile_cache = CachedTilesOf(problem, options);
  if (tile_cache == 0) return 0;
  const PrefillKernelInfo kernel = PrefillKernelFor<Loader::kCpAsync>(problem);
  tile_cache = std::min(tile_cache, room / kernel.cached_tile_bytes);
  while (CacheStateBytes(kernel, tile_cache) + tile_cache * kernel.cached_tile_bytes > room) --tile_cache;
  return tile_cache;
}

Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  return Status::Internal(std::string("implementation 'fused': ") + what + ": " + cudaGetErrorString(error));
}

// With `overlaps`, the kernel may start while the one in front of it still runs; it waits by itself.
template <typename Args>
Status LaunchKernel(const Launch& launch, int shared_bytes, bool overlaps, const Args& args, const char* name,
                    cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = launch.grid;
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  void* parameters[] = {const_cast<Args*>(&args)};
  return CudaStatus(cudaLaunchKernelExC(&config, launch.kernel, parameters), name);
}

// Zeros that are there when this returns, whatever streams kernels run on later.
Status MakeFlags(std::unique_ptr<uint32_t, FreeOnDevice>* flags) {
  constexpr char kWhat[] = "memory of the CTAs' flags";
  constexpr size_t kIs8Bit = kMaxCtas * sizeof(uint32_t);
  uint32_t* memory = nullptr;
  if (Status s = CudaStatus(cudaMalloc(&memory, kIs8Bit), kWhat); !s.ok()) return s;
  flags->reset(memory);
  cudaStream_t stream = nullptr;
  if (Status s = CudaStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kWhat); !s.ok())
    return s;
  const cudaError_t filled = cudaMemsetAsync(memory, 0, kIs8Bit, stream);
  const cudaError_t done = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return CudaStatus(filled != cudaSuccess ? filled : done, kWhat);
}

// Makes a kernel of prefill ready, if there is one for this device.
Status PreparePrefill(const PrefillKernelInfo& info, int num_sms, PrefillDevice* prefill) {
  if (info.kernel == nullptr) return Status::Ok();
  int capability = 0;
  if (Status s = CudaStatus(device::CompiledFor(info.kernel, &capability), "no kernel for this device");
      !s.ok())
    return s;
  if (capability != kPrefillCapability) return Status::Ok();
  *prefill = {info.kernel,     num_sms,         info.threads,     info.shared_bytes,
              info.shape.rows, info.shape.keys, info.cache_slices};
  return CudaStatus(
      cudaFuncSetAttribute(info.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, info.shared_bytes),
      "shared memory of the prefill kernel");
}

// Whether a pool's rows of H elements have numbers of 32 bits.
bool RowsHaveNumbers(const AttentionProblem& problem, int64_t num_pages, const PageStrides& strides) {
  const int64_t H = problem.head_dim;
  const auto last = [](int64_t count) { return std::max<int64_t>(count, 1) - 1; };
  return strides.page % H == 0 && strides.token % H == 0 && strides.head % H == 0 &&
         (last(num_pages) * strides.page + last(problem.page_size) * strides.token +
          last(problem.num_kv_heads) * strides.head) /
                 H <=
             UINT32_MAX;
}

PoolRows PoolRowsOf(const AttentionProblem& problem, const void* pages, int64_t num_pages,
                    const PageStrides& strides) {
  const auto rows = [&](int64_t stride) { return static_cast<uint32_t>(stride / problem.head_dim); };
  return {static_cast<const char*>(pages),
          rows(strides.page),
          rows(strides.token),
          rows(strides.head),
          rows(strides.token * problem.page_size),
          static_cast<uint32_t>(num_pages)};
}

// The kernel that sequences with many rows go to, or null: then they go to that of decode.
const PrefillDevice* ChoosePrefill(const AttentionProblem& problem, const AttentionParams& params,
                                   const Device& device, bool* by_boxes) {
  *by_boxes = device.prefill_by_tma.kernel != nullptr &&
              TensorMapExists(problem, problem.num_k_pages, params.k_pages, params.k_strides) &&
              TensorMapExists(problem, problem.num_v_pages, params.v_pages, params.v_strides);
  const PrefillDevice& prefill = *by_boxes ? device.prefill_by_tma : device.prefill_by_cp_async;
  const bool finds_pages = *by_boxes || (RowsHaveNumbers(problem, problem.num_k_pages, params.k_strides) &&
                                         RowsHaveNumbers(problem, problem.num_v_pages, params.v_strides));
  return prefill.kernel != nullptr && finds_pages ? &prefill : nullptr;
}

// In nanoseconds on an H100, where a multiprocessor that decodes reads up to 38 GB/s, if others leave it as
// much, and one that prefills makes some 5 TFLOP/s.
TileCosts CostsOfTiles(const AttentionProblem& problem) {
  const auto elements = static_cast<int32_t>(2 * kTileKeys * problem.head_dim);
  return {elements * static_cast<int32_t>(ByteWidth(problem.kv_dtype)) / 38, 2 * kTileRows * elements / 5000};
}

// `workspace` is the start of prefill's.
Status MakePrefillArgs(const DecodeArgs& call, const Options& options, const PrefillDevice& prefill,
                       bool by_boxes, int64_t num_cached_tiles, char* workspace, PrefillArgs* args) {
  const PrefillLayout layout = LayOutPrefill(call.problem, options, num_cached_tiles);
  args->call = call;
  args->call.partials = {reinterpret_cast<float*>(workspace),
                         reinterpret_cast<float2*>(workspace + layout.stats), prefill.tile_rows};
  args->arrivals = reinterpret_cast<uint32_t*>(workspace + layout.arrivals);
  args->plan = reinterpret_cast<PrefillPlan*>(workspace + layout.plan);
  args->planned = reinterpret_cast<PlannedSequence*>(workspace + layout.planned);
  args->shape = {prefill.tile_rows, prefill.tile_keys};
  args->num_ctas = prefill.num_ctas;
  args->tile_cache = {workspace + layout.tile_cache,
                      reinterpret_cast<uint32_t*>(workspace + layout.cache_states),
                      static_cast<int32_t>(num_cached_tiles), prefill.cache_slices};
  args->bytes_per_token = static_cast<int32_t>(2 * call.problem.head_dim * kBytesPerElement);
  if (!by_boxes) {
    const AttentionParams& params = call.params;
    args->k_rows = PoolRowsOf(call.problem, params.k_pages, call.problem.num_k_pages, params.k_strides);
    args->v_rows = PoolRowsOf(call.problem, params.v_pages, call.problem.num_v_pages, params.v_strides);
    return Status::Ok();
  }
  const int32_t box_rows = TmaBoxRows(call.problem.page_size, prefill.tile_keys);
  while (1 << args->box_rows_log2 < box_rows) ++args->box_rows_log2;
  const AttentionParams& params = call.params;
  if (Status s = MakeTensorMap(call.problem, call.problem.num_k_pages, params.k_pages, params.k_strides,
                               box_rows, &args->k_map, &args->k_blocks_per_head);
      !s.ok()) {
    return s;
  }
  return MakeTensorMap(call.problem, call.problem.num_v_pages, params.v_pages, params.v_strides, box_rows,
                       &args->v_map, &args->v_blocks_per_head);
}

}  // namespace

int64_t WorkspaceBytes(const AttentionProblem& problem, const Options& options) {
  return LayOut(problem, options, CachedTilesOf(problem, options)).bytes;
}

int64_t WorkspaceBound(const AttentionProblem& problem, const Options& options) {
  AttentionProblem one = problem;
  one.num_rows = one.num_seqs = 1;
  return LayOut(one, options, MaxCachedTiles(problem, options)).bytes;
}

int64_t WorkspaceBytesPerRow(const AttentionProblem& problem) {
  return problem.num_q_heads * kMaxSplits *
         (problem.head_dim * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(float2)));
}

void FreeOnDevice::operator()(uint32_t* memory) const { cudaFree(memory); }

Status Prepare(const AttentionProblem& problem, Device* device) {
  const DecodeKernelInfo info = KernelFor(problem);
  if (info.kernel == nullptr) {
    return Status::InvalidArgument(std::string("implementation: 'fused' has no kernel for q of ") +
                                   Name(problem.q_dtype) + ", pages of " + Name(problem.kv_dtype) +
                                   " and head dim " + std::to_string(problem.head_dim));
  }
  int index = 0, num_sms = 0;
  if (Status s = CudaStatus(cudaGetDevice(&index), "no current device"); !s.ok()) return s;
  if (Status s = CudaStatus(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, index),
                            "number of multiprocessors");
      !s.ok()) {
    return s;
  }
  int capability = 0;
  if (Status s = CudaStatus(device::CompiledFor(info.kernel, &capability), "no kernel for this device");
      !s.ok())
    return s;
  device->kernel = info.kernel;
  device->threads = info.threads;
  device->ctas_per_sm = info.ctas_per_sm(capability);
  device->num_sms = std::min(num_sms, kMaxCtas / device->ctas_per_sm);
  device->shared_bytes = info.shared_bytes(capability);
  device->overlaps = capability >= 90;
  if (Status s = PreparePrefill(PrefillKernelFor<Loader::kTma>(problem), num_sms, &device->prefill_by_tma);
      !s.ok())
    return s;
  if (Status s =
          PreparePrefill(PrefillKernelFor<Loader::kCpAsync>(problem), num_sms, &device->prefill_by_cp_async);
      !s.ok())
    return s;
  if (Status s = MakeFlags(&device->partial_ready); !s.ok()) return s;
  return CudaStatus(
      cudaFuncSetAttribute(info.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_bytes),
      "shared memory of the decode kernel");
}

Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Options& options,
                    const Device& device, int64_t workspace_bytes, cudaStream_t stream) {
  const Layout layout = LayOut(problem, options, 0);
  if (workspace_bytes < layout.bytes) {
    return Status::InvalidArgument("workspace: expected at least " + std::to_string(layout.bytes) +
                                   " bytes, got " + std::to_string(workspace_bytes));
  }
  constexpr int64_t kMost = INT32_MAX;
  if (problem.num_rows * problem.num_q_heads > kMost || problem.num_seqs > kMost ||
      problem.page_size > kMost || std::max(problem.num_k_pages, problem.num_v_pages) > kMost) {
    return Status::InvalidArgument(
        "q, k_pages: expected T * N, B, the page size and the number of pages below 2^31");
  }
  if (problem.num_rows == 0 || problem.num_q_heads == 0) return Status::Ok();

  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(params.workspace) + kAlign - 1) / kAlign * kAlign;
  char* const workspace = reinterpret_cast<char*>(start);
  DecodeArgs args{};
  args.problem = problem;
  args.params = params;
  const auto divisor = [](int64_t number) {
    return FastDivisor(static_cast<int32_t>(std::max<int64_t>(number, 1)));
  };
  const auto seqs_per = [&](int64_t rows) { return divisor(rows > 0 ? problem.num_seqs / rows : 1); };
  args.facts = {divisor(group),
                static_cast<int32_t>(problem.num_kv_heads),
                static_cast<int32_t>(problem.num_rows),
                static_cast<int32_t>(std::min(problem.max_pages * problem.page_size, kMost)),
                static_cast<int32_t>(std::min(params.sliding_window, kMost)),
                params.causal};
  args.partials = {reinterpret_cast<float*>(workspace), reinterpret_cast<float2*>(workspace + layout.stats),
                   static_cast<int32_t>(layout.rows_each)};
  args.partial_ready = device.partial_ready.get();
  args.num_ctas = device.num_sms * device.ctas_per_sm;
  for (int eighths = 1; eighths <= kEighths; ++eighths) {
    const int sms = std::max(device.num_sms * eighths / kEighths, 1);
    args.sms[eighths - 1] = sms;
    args.head_queues[eighths - 1] =
        MakeHeadQueues(static_cast<int32_t>(problem.num_kv_heads), sms * device.ctas_per_sm);
  }
  args.costs = CostsOfTiles(problem);
  args.page_size = divisor(problem.page_size);
  args.seqs_per_sink = seqs_per(problem.num_sinks);
  args.seqs_per_k_scale = seqs_per(problem.num_k_scales);
  args.seqs_per_v_scale = seqs_per(problem.num_v_scales);
  args.score_factor = params.scale * kLog2E * (params.soft_cap > 0 ? 2.0f / params.soft_cap : 1.0f);
  args.num_pages = static_cast<int32_t>(std::max(problem.num_k_pages, problem.num_v_pages));
  const PageStrides &k = params.k_strides, &v = params.v_strides;
  args.same_offsets = k.page == v.page && k.token == v.token && k.head == v.head &&
                      problem.num_k_pages == problem.num_v_pages;
  args.batch_invariant = options.batch_invariant;
  args.split_rows_by_sequence = !options.decode && problem.num_rows > kMaxSplitRows * problem.num_seqs;

  // No sequence has more rows than q: where these are few, none is prefill's.
  const int32_t decode_rows = std::max(kTileRows / static_cast<int32_t>(group), 1);
  bool by_boxes = false;
  const PrefillDevice* prefill = nullptr;
  if (!options.decode && problem.num_seqs > 0 && problem.num_rows > decode_rows)
    prefill = ChoosePrefill(problem, params, device, &by_boxes);
  PrefillArgs prefill_args{};
  if (prefill != nullptr) {
    args.facts.decode_rows = decode_rows;
    if (Status s = MakePrefillArgs(args, options, *prefill, by_boxes,
                                   CachedTilesThatFit(problem, options, workspace_bytes - layout.bytes),
                                   workspace + layout.prefill, &prefill_args);
        !s.ok()) {
      return s;
    }
    if (Status s =
            LaunchKernel(ScheduleLaunch(), 0, false, prefill_args, "launch of the schedule kernel", stream);
        !s.ok()) {
      return s;
    }
  }
  const bool prefills = prefill != nullptr;
  const Launch decode = {device.kernel, dim3(static_cast<unsigned>(args.num_ctas + (prefills ? 1 : 0))),
                         device.threads};
  if (Status s =
          LaunchKernel(decode, device.shared_bytes, prefills, args, "launch of the decode kernel", stream);
      !s.ok()) {
    return s;
  }
  if (prefills) {
    const Launch launch = {prefill->kernel, dim3(static_cast<unsigned>(prefill->num_ctas)), prefill->threads};
    if (Status s = LaunchKernel(launch, prefill->shared_bytes, true, prefill_args,
                                "launch of the prefill kernel", stream);
        !s.ok()) {
      return s;
    }
  }
  if (!options.batch_invariant || problem.num_seqs == 0) return Status::Ok();
  return LaunchKernel(CombineLaunch(args), 0, device.overlaps && !prefills, args,
                      "launch of the combine kernel", stream);
}

}  // namespace jpa::fused
