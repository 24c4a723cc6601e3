# find_package(jax_paged_attn): the engines' C++ API as static libraries. jax_paged_attn::cpu is attention on the CPU,
# ::cache writes pages, ::core is what both stand on. The headers say what a call needs; see examples/downstream.

include(CMakeFindDependencyMacro)
find_dependency(Threads)
include("${CMAKE_CURRENT_LIST_DIR}/jax_paged_attn-targets.cmake")
foreach(JPA_COMPONENT IN LISTS jax_paged_attn_FIND_COMPONENTS)
  if(TARGET jax_paged_attn::${JPA_COMPONENT})
    set(jax_paged_attn_${JPA_COMPONENT}_FOUND TRUE)
  elseif(jax_paged_attn_FIND_REQUIRED_${JPA_COMPONENT})
    set(jax_paged_attn_FOUND FALSE)
    set(jax_paged_attn_NOT_FOUND_MESSAGE "jax_paged_attn has no component ${JPA_COMPONENT}")
  endif()
endforeach()
