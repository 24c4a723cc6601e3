// The FFI handlers of the write on CUDA, as what module_cuda.cc may know of them: opaque pointers.
#pragma once

namespace jpa {

void* WriteV1CudaHandler();  // target jax_paged_attn.write.v1
void* WriteV2CudaHandler();  // target jax_paged_attn.write.v2
void* WriteV3CudaHandler();  // target jax_paged_attn.write.v3

}  // namespace jpa
