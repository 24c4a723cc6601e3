#include "ffi/handler_write_cuda.h"

#include <cuda_runtime_api.h>

#include "cache/write_cuda.h"
#include "ffi/bind.h"
#include "ffi/guard.h"
#include "ffi/parse.h"

namespace jpa {
namespace {

constexpr Target kV1 = {.platform = Platform::kCuda, .version = 1};
constexpr Target kV2 = {.platform = Platform::kCuda, .version = 2};
constexpr Target kV3 = {.platform = Platform::kCuda, .version = 3};

template <Target target>
ffi::Error Write(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 ffi::Dictionary dictionary) {
  return Guard([&] {
    WriteTensors tensors;
    WriteAttributes attributes;
    WriteProblem problem;
    WriteParams params;
    if (Status s = WriteTensors::Bind(target, args, rets, &tensors); !s.ok()) return s;
    if (Status s = ReadAttributes(dictionary, target, &attributes); !s.ok()) return s;
    if (Status s = ParseWrite(tensors, target, attributes, &problem, &params); !s.ok()) return s;
    return cache::LaunchWrite(problem, params, stream);
  });
}

auto BindCall() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<ffi::Dictionary>();
}

// One launch of the same grid at every call of a compiled program, so a command buffer may hold it.
XLA_FFI_DEFINE_HANDLER(kWriteV1Handler, Write<kV1>, BindCall(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kWriteV2Handler, Write<kV2>, BindCall(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kWriteV3Handler, Write<kV3>, BindCall(), {ffi::Traits::kCmdBufferCompatible});

}  // namespace

void* WriteV1CudaHandler() { return reinterpret_cast<void*>(kWriteV1Handler); }
void* WriteV2CudaHandler() { return reinterpret_cast<void*>(kWriteV2Handler); }
void* WriteV3CudaHandler() { return reinterpret_cast<void*>(kWriteV3Handler); }

}  // namespace jpa
