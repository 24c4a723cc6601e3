// The FFI handlers of the CPU, as what module_cpu.cc may know of them: opaque pointers.
#pragma once

#include <string>

namespace jpa {

void* AttentionV1CpuHandler();  // target jax_paged_attn.attention.v1
void* AttentionV2CpuHandler();  // target jax_paged_attn.attention.v2
void* AttentionV3CpuHandler();  // target jax_paged_attn.attention.v3
void* AttentionV4CpuHandler();  // target jax_paged_attn.attention.v4
void* WriteV1CpuHandler();      // target jax_paged_attn.write.v1
void* WriteV2CpuHandler();      // target jax_paged_attn.write.v2
void* WriteV3CpuHandler();      // target jax_paged_attn.write.v3

// The version of the XLA FFI headers that the handlers were compiled with. A runtime accepts this version or
// older ones.
std::string FfiApiVersion();

}  // namespace jpa
