// The FFI handlers of attention on CUDA, as what module_cuda.cc may know of them: opaque pointers.
#pragma once

#include <cstdint>
#include <string>

namespace jpa {

// One for each of XLA's stages.
struct AttentionCudaHandlers {
  void* instantiate;
  void* initialize;
  void* execute;
};
AttentionCudaHandlers AttentionV1CudaHandlers();  // of target jax_paged_attn.attention.v1
AttentionCudaHandlers AttentionV2CudaHandlers();  // of target jax_paged_attn.attention.v2
AttentionCudaHandlers AttentionV3CudaHandlers();  // of target jax_paged_attn.attention.v3
AttentionCudaHandlers AttentionV4CudaHandlers();  // of target jax_paged_attn.attention.v4
AttentionCudaHandlers AttentionV5CudaHandlers();  // of target jax_paged_attn.attention.v5

// The type of what the first stage makes for the others: XLA_FFI_TypeId* and XLA_FFI_TypeInfo*.
struct AttentionCudaStateType {
  void* id;
  void* info;
};
AttentionCudaStateType GetAttentionCudaStateType();

// How often the execute stage has run in this process: less often than attention has, where XLA replays a
// CUDA graph.
int64_t AttentionCudaHostCalls();

// The version of the XLA FFI headers that the handlers were compiled with. A runtime accepts this version or
// older ones.
std::string CudaFfiApiVersion();

}  // namespace jpa
