// Finds the kernels of a call and makes them ready on the current device.
#include <algorithm>
#include <cstdint>
#include <string>

#include "core/dtype_name.h"
#include "device/compiled_for.h"
#include "device/cuda_status.h"
#include "engines/fused/decode/args.h"
#include "engines/fused/kernel_choice.h"
#include "engines/fused/mla/args.h"
#include "engines/fused/run.h"

namespace jpa::fused {
namespace {

Status Check(cudaError_t error, const char* what) {
  return device::CudaStatus(error, "implementation 'fused'", what);
}

// Makes zeros that are there when this returns, whatever streams kernels run on later.
Status MakeFlags(std::unique_ptr<uint32_t, FreeOnDevice>* flags) {
  constexpr char kWhat[] = "memory of the CTAs' flags";
  constexpr size_t kBytes = kMaxCtas * sizeof(uint32_t);
  void* memory = nullptr;
  if (Status s = Check(cudaMalloc(&memory, kBytes), kWhat); !s.ok()) return s;
  flags->reset(static_cast<uint32_t*>(memory));
  cudaStream_t stream = nullptr;
  if (Status s = Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kWhat); !s.ok()) return s;
  const cudaError_t filled = cudaMemsetAsync(memory, 0, kBytes, stream);
  const cudaError_t synchronized = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return Check(filled != cudaSuccess ? filled : synchronized, kWhat);
}

Status AllowSharedMemory(const void* kernel, int bytes, const char* what) {
  return Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
}

// Makes a prefill kernel ready, if there is one for this device.
Status PreparePrefill(const PrefillKernelInfo& info, int num_sms, PrefillDevice* prefill) {
  if (info.kernel == nullptr) return Status::Ok();
  int capability = 0;
  if (Status s = Check(device::CompiledFor(info.kernel, &capability), "no kernel for this device"); !s.ok())
    return s;
  if (capability != kPrefillCapability) return Status::Ok();
  *prefill = {.kernel = info.kernel,
              .num_ctas = num_sms,
              .threads = info.threads,
              .shared_bytes = info.shared_bytes,
              .tile_rows = info.shape.rows,
              .tile_keys = info.shape.keys,
              .cache_slices = info.cache_slices,
              .may_decode = info.may_decode};
  return AllowSharedMemory(info.kernel, info.shared_bytes, "shared memory of the prefill kernel");
}

Status PrepareKernel(const DecodeKernelInfo& info, int capability, DecodeDevice* decode) {
  const auto ring_of = [&](int num_stages) {
    return StageRing{.num_stages = num_stages, .shared_bytes = info.shared_bytes(capability, num_stages)};
  };
  *decode = {.kernel = info.kernel,
             .threads = info.threads,
             .ctas_per_sm = info.ctas_per_sm(capability),
             .stages = ring_of(info.num_stages(capability)),
             .stages_of_few = ring_of(info.num_stages_of_few(capability))};
  return AllowSharedMemory(info.kernel, decode->stages_of_few.shared_bytes,
                           "shared memory of the decode kernel");
}

Status PrepareDecode(const AttentionProblem& problem, int num_sms, Device* device) {
  const DecodeKernelInfo info = DecodeKernelFor(problem);
  if (info.kernel == nullptr) {
    return Status::InvalidArgument(std::string("implementation: 'fused' has no kernel for q of ") +
                                   Name(problem.q_dtype) + ", pages of " + Name(problem.kv_dtype) +
                                   ", head dim " + std::to_string(problem.head_dim) + " and values of " +
                                   std::to_string(problem.value_dim) +
                                   (problem.ValuesInKeys() ? " in the keys" : ""));
  }
  int capability = 0;
  if (Status s = Check(device::CompiledFor(info.kernel, &capability), "no kernel for this device"); !s.ok())
    return s;
  device->num_sms = std::min(num_sms, kMaxCtas / info.ctas_per_sm(capability));
  device->overlaps = capability >= 90;
  return PrepareKernel(info, capability, &device->decode);
}

// Makes a decode kernel ready that takes two CTAs per multiprocessor, if there is one for this device.
Status PreparePaired(const DecodeKernelInfo& info, const Device& device, DecodeDevice* decode) {
  if (info.kernel == nullptr || device.decode.ctas_per_sm == 1) return Status::Ok();
  int capability = 0;
  if (Status s = Check(device::CompiledFor(info.kernel, &capability), "no kernel for this device"); !s.ok())
    return s;
  return PrepareKernel(info, capability, decode);
}

// Makes decode's second kernel ready, if there is one for this device.
Status PrepareWarpgroup(const AttentionProblem& problem, Device* device) {
  const DecodeKernelInfo info = WarpgroupKernelFor(problem);
  if (info.kernel == nullptr) return Status::Ok();
  int capability = 0;
  if (Status s = Check(device::CompiledFor(info.kernel, &capability), "no kernel for this device"); !s.ok())
    return s;
  if (capability != kPrefillCapability) return Status::Ok();
  return PrepareKernel(info, capability, &device->decode_by_warpgroup);
}

// CTAs wait for each other, so a grid has no more of them than the device runs at the same time.
Status FindClustersAtOnce(int cluster, MlaDevice* mla) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {.x = static_cast<unsigned>(cluster), .y = 1, .z = 1};
  const int wanted = mla->num_ctas / cluster * cluster;
  const cudaLaunchConfig_t launch = {.gridDim = dim3(static_cast<unsigned>(wanted)),
                                     .blockDim = dim3(static_cast<unsigned>(mla->threads)),
                                     .dynamicSmemBytes = static_cast<size_t>(mla->shared_bytes),
                                     .stream = nullptr,
                                     .attrs = &attribute,
                                     .numAttrs = 1};
  int clusters = 0;
  if (Status s = Check(cudaOccupancyMaxActiveClusters(&clusters, mla->kernel, &launch),
                       "number of clusters of the MLA kernel");
      !s.ok()) {
    return s;
  }
  mla->num_ctas = std::min(wanted, clusters * cluster);
  if (mla->num_ctas == 0) mla->kernel = nullptr;
  return Status::Ok();
}

// For clusters of so many CTAs.
Status PrepareMla(const MlaKernelInfo& info, int num_sms, int cluster, MlaDevice* mla) {
  int capability = 0;
  if (Status s = Check(device::CompiledFor(info.kernel, &capability), "no MLA kernel for this device");
      !s.ok())
    return s;
  if (capability != kPrefillCapability) {
    return Status::InvalidArgument(
        "implementation: 'fused' has MLA kernels for compute capability 9.0 alone; 'cublaslt' runs on "
        "others");
  }
  if (Status s = AllowSharedMemory(info.kernel, info.shared_bytes, "shared memory of the MLA kernel");
      !s.ok())
    return s;
  *mla = {.kernel = info.kernel,
          .num_ctas = std::min(num_sms, kMaxMlaCtas),
          .threads = info.threads,
          .shared_bytes = info.shared_bytes};
  return cluster == 1 ? Status::Ok() : FindClustersAtOnce(cluster, mla);
}

template <ValuePlace place>
Status PrepareMlaLoaders(const AttentionProblem& problem, int num_sms, Device* device) {
  if (Status s = PrepareMla(MlaKernelFor<place, Loader::kTma>(problem), num_sms, 1, &device->mla_by_tma);
      !s.ok())
    return s;
  return PrepareMla(MlaKernelFor<place, Loader::kCpAsync>(problem), num_sms, 1, &device->mla_by_cp_async);
}

Status PrepareMlaKernels(const AttentionProblem& problem, int num_sms, Device* device) {
  device->num_sms = std::min(num_sms, kMaxMlaCtas);
  device->overlaps = true;
  if (problem.ValuesInKeys()) {
    if (Status s = PrepareMlaLoaders<ValuePlace::kInKeys>(problem, num_sms, device);
        !s.ok() || Is8Bit(problem))
      return s;
    return PrepareMla(MlaKernelFor<ValuePlace::kInKeys, Loader::kTma, Sharing::kRows>(problem), num_sms, 1,
                      &device->mla_by_rows);
  }
  if (Status s = PrepareMlaLoaders<ValuePlace::kOwnPool>(problem, num_sms, device); !s.ok()) return s;
  return PrepareMla(MlaKernelFor<ValuePlace::kOwnPool, Loader::kTma, Sharing::kPairs>(problem), num_sms, 2,
                    &device->mla_by_pairs);
}

bool HasMlaKernel(const AttentionProblem& problem) {
  constexpr Loader kAny = Loader::kCpAsync;
  const MlaKernelInfo info = problem.ValuesInKeys() ? MlaKernelFor<ValuePlace::kInKeys, kAny>(problem)
                                                    : MlaKernelFor<ValuePlace::kOwnPool, kAny>(problem);
  return info.kernel != nullptr;
}

}  // namespace

void FreeOnDevice::operator()(uint32_t* memory) const { cudaFree(memory); }

Status Prepare(const AttentionProblem& problem, Device* device) {
  int index = 0, num_sms = 0;
  if (Status s = Check(cudaGetDevice(&index), "no current device"); !s.ok()) return s;
  if (Status s = Check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, index),
                       "number of multiprocessors");
      !s.ok()) {
    return s;
  }
  if (Status s = MakeFlags(&device->partial_ready); !s.ok()) return s;
  if (HasMlaKernel(problem)) return PrepareMlaKernels(problem, num_sms, device);
  if (problem.num_padding_columns > 0) {
    return Status::InvalidArgument(
        "k_pages: expected keys without padding, which MLA kernels alone pass over");
  }
  if (Status s = PrepareDecode(problem, num_sms, device); !s.ok()) return s;
  if (Status s = PreparePaired(FoldingKernelFor(problem), *device, &device->decode_folding); !s.ok())
    return s;
  if (Status s = PreparePaired(InPlaceKernelFor(problem), *device, &device->decode_in_place); !s.ok())
    return s;
  if (Status s = PreparePaired(KernelForFewFor(problem), *device, &device->decode_of_few); !s.ok()) return s;
  if (Status s = PrepareWarpgroup(problem, device); !s.ok()) return s;
  if (Status s = PreparePrefill(PrefillKernelFor<Loader::kTma>(problem), num_sms, &device->prefill_by_tma);
      !s.ok()) {
    return s;
  }
  return PreparePrefill(PrefillKernelFor<Loader::kCpAsync>(problem), num_sms, &device->prefill_by_cp_async);
}

}  // namespace jpa::fused
