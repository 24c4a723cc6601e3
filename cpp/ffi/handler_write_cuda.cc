#include "ffi/handler_write_cuda.h"

#include <cuda_runtime_api.h>

#include "cache/write_cuda.h"
#include "ffi/guard.h"
#include "ffi/parse.h"

namespace jpa {
namespace {

ffi::Error Write(cudaStream_t stream, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, ffi::AnyBuffer k,
                 ffi::AnyBuffer v, ffi::AnyBuffer slot_mapping, ffi::AnyBuffer k_scale,
                 ffi::AnyBuffer v_scale, ffi::Result<ffi::AnyBuffer> k_pages_out,
                 ffi::Result<ffi::AnyBuffer> v_pages_out) {
  return Guard([&] {
    const WriteBuffers buffers = {{"k_pages", k_pages},
                                  {"v_pages", v_pages},
                                  {"k", k},
                                  {"v", v},
                                  {"slot_mapping", slot_mapping},
                                  {"k_scale", k_scale},
                                  {"v_scale", v_scale},
                                  {"k_pages (result)", *k_pages_out},
                                  {"v_pages (result)", *v_pages_out}};
    WriteProblem problem;
    WriteParams params;
    if (Status s = ParseWrite(buffers, &problem, &params); !s.ok()) return s;
    return cache::LaunchWrite(problem, params, stream);
  });
}

// One launch of the same grid at every call of a compiled program, so a command buffer may hold it.
XLA_FFI_DEFINE_HANDLER(kWrite, Write,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()   // k_pages
                           .Arg<ffi::AnyBuffer>()   // v_pages
                           .Arg<ffi::AnyBuffer>()   // k
                           .Arg<ffi::AnyBuffer>()   // v
                           .Arg<ffi::AnyBuffer>()   // slot_mapping
                           .Arg<ffi::AnyBuffer>()   // k_scale
                           .Arg<ffi::AnyBuffer>()   // v_scale
                           .Ret<ffi::AnyBuffer>()   // k_pages, aliased
                           .Ret<ffi::AnyBuffer>(),  // v_pages, aliased
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

void* WriteCudaHandler() { return reinterpret_cast<void*>(kWrite); }

}  // namespace jpa
