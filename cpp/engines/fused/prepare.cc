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
              .cache_slices = info.cache_slices};
  return AllowSharedMemory(info.kernel, info.shared_bytes, "shared memory of the prefill kernel");
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
  device->kernel = info.kernel;
  device->threads = info.threads;
  device->ctas_per_sm = info.ctas_per_sm(capability);
  device->num_sms = std::min(num_sms, kMaxCtas / device->ctas_per_sm);
  device->shared_bytes = info.shared_bytes(capability);
  device->overlaps = capability >= 90;
  return AllowSharedMemory(info.kernel, device->shared_bytes, "shared memory of the decode kernel");
}

Status PrepareMla(const MlaKernelInfo& info, MlaDevice* mla) {
  int capability = 0;
  if (Status s = Check(device::CompiledFor(info.kernel, &capability), "no MLA kernel for this device");
      !s.ok())
    return s;
  if (capability != kPrefillCapability) {
    return Status::InvalidArgument(
        "implementation: 'fused' has MLA kernels for compute capability 9.0 alone; 'cublaslt' runs on "
        "others");
  }
  *mla = {.kernel = info.kernel, .threads = info.threads, .shared_bytes = info.shared_bytes};
  return AllowSharedMemory(info.kernel, info.shared_bytes, "shared memory of the MLA kernel");
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
  if (IsMla(problem) && problem.ValuesInKeys()) {
    device->ctas_per_sm = 1;
    device->num_sms = std::min(num_sms, kMaxMlaCtas);
    device->overlaps = true;
    if (Status s = PrepareMla(MlaKernelFor<Loader::kTma>(problem), &device->mla_by_tma); !s.ok()) return s;
    return PrepareMla(MlaKernelFor<Loader::kCpAsync>(problem), &device->mla_by_cp_async);
  }
  if (Status s = PrepareDecode(problem, num_sms, device); !s.ok()) return s;
  if (Status s = PreparePrefill(PrefillKernelFor<Loader::kTma>(problem), num_sms, &device->prefill_by_tma);
      !s.ok()) {
    return s;
  }
  return PreparePrefill(PrefillKernelFor<Loader::kCpAsync>(problem), num_sms, &device->prefill_by_cp_async);
}

}  // namespace jpa::fused
