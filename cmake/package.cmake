# Installs the engines' C++ API into the wheel: headers, static libraries, and a CMake package that finds them from
# wherever the wheel was unpacked. `python -m jax_paged_attn --cmakedir` prints its folder; examples/downstream uses it.

include(CMakePackageConfigHelpers)

set(JPA_PACKAGE_DIR jax_paged_attn/cmake)
set(JPA_INCLUDE_DIR jax_paged_attn/include)

# jpa_install_library(SET TARGET NAME HEADER...): TARGET becomes jax_paged_attn::NAME, in a file of the set's targets.
function(jpa_install_library set target name)
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target} INTERFACE $<INSTALL_INTERFACE:${JPA_INCLUDE_DIR}>)
  install(TARGETS ${target} EXPORT ${set} ARCHIVE DESTINATION jax_paged_attn/lib)
  foreach(header IN LISTS ARGN)
    get_filename_component(folder ${header} DIRECTORY)
    install(FILES cpp/${header} DESTINATION ${JPA_INCLUDE_DIR}/${folder})
  endforeach()
endfunction()

jpa_install_library(cpu-targets jpa_core core
  core/constants.h core/convert.h core/host_device.h core/integer_math.h core/parallel_for.h core/params.h core/problem.h core/status.h core/task_runner.h
  core/visibility.h core/workspace.h)
jpa_install_library(cpu-targets jpa_cpu cpu engines/cpu/isa.h engines/cpu/kernels.h engines/cpu/run.h)
jpa_install_library(cpu-targets jpa_cache cache cache/write.h)
install(EXPORT cpu-targets NAMESPACE jax_paged_attn:: DESTINATION ${JPA_PACKAGE_DIR})

if(TARGET jpa_fused)  # of CUDA 13
  # Whoever links them brings the CUDA runtime, static or shared.
  jpa_install_library(cuda-targets jpa_fused fused engines/fused/run.h)
  jpa_install_library(cuda-targets jpa_cublaslt cublaslt
    device/cuda_status.h device/launch.h engines/cublaslt/gemm.h engines/cublaslt/library.h engines/cublaslt/plan.h engines/cublaslt/run.h)
  jpa_install_library(cuda-targets jpa_cache_cuda cache_cuda cache/write_cuda.h)
  install(EXPORT cuda-targets NAMESPACE jax_paged_attn:: DESTINATION ${JPA_PACKAGE_DIR})
endif()

# Before 1.0 a minor version may change the API.
write_basic_package_version_file(jax_paged_attn-config-version.cmake
  VERSION ${SKBUILD_PROJECT_VERSION} COMPATIBILITY SameMinorVersion)
install(FILES cmake/jax_paged_attn-config.cmake
              "${CMAKE_CURRENT_BINARY_DIR}/jax_paged_attn-config-version.cmake"
        DESTINATION ${JPA_PACKAGE_DIR})
