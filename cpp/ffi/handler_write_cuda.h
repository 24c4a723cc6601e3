// The FFI handler of the write on CUDA, as what module_cuda.cc may know of it: an opaque pointer.
#pragma once

namespace jpa {

void* WriteCudaHandler();  // target jax_paged_attn.write.v1

}  // namespace jpa
