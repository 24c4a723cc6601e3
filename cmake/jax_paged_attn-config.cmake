# find_package(jax_paged_attn): the engines' C++ API as static libraries; see examples/downstream.
#
#   jax_paged_attn::core                        what all stand on
#   jax_paged_attn::cpu, ::cache                attention and cache writes on the CPU
#   jax_paged_attn::fused, ::cublaslt, ::cache_cuda   the same on CUDA, where COMPONENTS has `cuda`
#
# The CUDA libraries need a CUDA runtime 13 of the user's: link CUDA::cudart_static or CUDA::cudart (find_package(CUDAToolkit)).

include(CMakeFindDependencyMacro)
find_dependency(Threads)
include("${CMAKE_CURRENT_LIST_DIR}/cpu-targets.cmake")
set(jax_paged_attn_cpu_FOUND TRUE)
include("${CMAKE_CURRENT_LIST_DIR}/cuda-targets.cmake" OPTIONAL RESULT_VARIABLE jax_paged_attn_cuda_FOUND)

foreach(JPA_COMPONENT IN LISTS jax_paged_attn_FIND_COMPONENTS)
  if(NOT jax_paged_attn_${JPA_COMPONENT}_FOUND AND jax_paged_attn_FIND_REQUIRED_${JPA_COMPONENT})
    set(jax_paged_attn_FOUND FALSE)
    set(jax_paged_attn_NOT_FOUND_MESSAGE "this installation has no component ${JPA_COMPONENT} (there are: cpu, cuda)")
  endif()
endforeach()
