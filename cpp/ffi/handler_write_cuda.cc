#include "ffi/handler_write_cuda.h"

#include <cuda_runtime_api.h>

#include "cache/write_cuda.h"
#include "ffi/bind.h"
#include "ffi/guard.h"
#include "ffi/parse.h"

namespace jpa {
namespace {

ffi::Error Write(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guard([&] {
    WriteTensors tensors;
    WriteProblem problem;
    WriteParams params;
    if (Status s = WriteTensors::Bind(args, rets, &tensors); !s.ok()) return s;
    if (Status s = ParseWrite(tensors, &problem, &params); !s.ok()) return s;
    return cache::LaunchWrite(problem, params, stream);
  });
}

// One launch of the same grid at every call of a compiled program, so a command buffer may hold it.
XLA_FFI_DEFINE_HANDLER(
    kWriteHandler, Write,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets(),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace

void* WriteCudaHandler() { return reinterpret_cast<void*>(kWriteHandler); }

}  // namespace jpa
