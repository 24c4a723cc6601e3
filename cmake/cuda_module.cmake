# jpa_add_cuda_module(VERSION): the CUDA engines and their Python module for a major version of the CUDA runtime, from one
# list of sources. For 13 the targets are jpa_fused, jpa_cublaslt, jpa_cache_cuda, _cuda; for 12 each of these names with 12
# at its end.
#
# Reads what cmake/cuda_toolchain.cmake and cuda12.cmake found: JPA_CUDA<VERSION>_INCLUDE_DIRS, _CUDART, _COMPILER (in words), and
# _LAUNCHER where the compiler of CMake's language CUDA does not serve as it is.

string(JOIN ", " JPA_ARCHITECTURE_NAMES ${JPA_CUDA_ARCHITECTURES})
set(JPA_GENCODE_OPTIONS)
foreach(architecture IN LISTS JPA_CUDA_ARCHITECTURES)
  if(architecture MATCHES "^([0-9]+a?)-virtual$")
    set(number ${CMAKE_MATCH_1})
    set(code compute_${number})
  elseif(architecture MATCHES "^[0-9]+a?$")
    set(number ${architecture})
    set(code sm_${number})
  else()
    message(FATAL_ERROR "JPA_CUDA_ARCHITECTURES: expected numbers such as 80, 90a or 120-virtual, got ${architecture}")
  endif()
  list(APPEND JPA_GENCODE_OPTIONS
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_${number}$<COMMA>code=${code}>")
endforeach()

# Only code for 90a holds the prefill kernels. That for 90 could not be told from it where a device runs either.
set(JPA_HAVE_SM90A OFF)
if("90a" IN_LIST JPA_CUDA_ARCHITECTURES OR "90a-virtual" IN_LIST JPA_CUDA_ARCHITECTURES)
  if("90" IN_LIST JPA_CUDA_ARCHITECTURES OR "90-virtual" IN_LIST JPA_CUDA_ARCHITECTURES)
    message(FATAL_ERROR "JPA_CUDA_ARCHITECTURES: expected 90 or 90a, got both")
  endif()
  set(JPA_HAVE_SM90A ON)
endif()

# Compressed, machine code for five architectures takes a quarter of the space. Zstandard is the smallest, but drivers
# before 550 read LZ4 alone, and CUDA 12 runs on drivers from 525 on.
set(JPA_CUDA13_COMPRESSION --compress-mode=size)
set(JPA_CUDA12_COMPRESSION --compress-mode=speed -Xfatbin=-compress-all)

# XLA's c_api.h names members like their types, which GCC refuses in pedantic mode even in system headers.
set(JPA_FFI_CUDA_SOURCES cpp/ffi/handler_cuda.cc cpp/ffi/handler_write_cuda.cc)
set_source_files_properties(${JPA_FFI_CUDA_SOURCES} PROPERTIES COMPILE_OPTIONS -Wno-pedantic)

function(jpa_add_cuda_module version)
  set(suffix)
  if(NOT version EQUAL 13)
    set(suffix ${version})
  endif()
  if(JPA_CUDA${version}_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${JPA_CUDA${version}_LAUNCHER}")
  endif()

  # Registers, shared memory and spills of every kernel go to the build's log, for tools/check_ptxas.py.
  set(flags jpa_cuda_flags${suffix})
  add_library(${flags} INTERFACE)
  target_compile_options(${flags} INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Werror=all-warnings;-Xcompiler=-Wall,-Wextra,-Werror;-Xptxas=-v>"
    "$<$<COMPILE_LANGUAGE:CUDA>:${JPA_CUDA${version}_COMPRESSION}>"
    ${JPA_GENCODE_OPTIONS})
  target_include_directories(${flags} SYSTEM INTERFACE ${JPA_CUDA${version}_INCLUDE_DIRS})
  target_link_libraries(${flags} INTERFACE "${JPA_CUDA${version}_CUDART}" ${CMAKE_DL_LIBS} rt)

  set(cublaslt jpa_cublaslt${suffix})
  add_library(${cublaslt} STATIC
    cpp/engines/cublaslt/combine.cu
    cpp/engines/cublaslt/cut.cu
    cpp/engines/cublaslt/gemm.cc
    cpp/engines/cublaslt/library.cc
    cpp/engines/cublaslt/pack.cu
    cpp/engines/cublaslt/plan.cc
    cpp/engines/cublaslt/run.cc
    cpp/engines/cublaslt/softmax.cu)

  set(fused jpa_fused${suffix})
  add_library(${fused} STATIC
    cpp/engines/fused/decode_choice.cc
    cpp/engines/fused/launch_mla.cc
    cpp/engines/fused/prepare.cc
    cpp/engines/fused/run.cc
    cpp/engines/fused/workspace.cc
    cpp/engines/fused/decode/combine.cu
    cpp/engines/fused/mla/tensor_map.cc
    cpp/engines/fused/prefill/schedule.cu
    cpp/engines/fused/prefill/tensor_map.cc
    ${JPA_FUSED_INSTANTIATIONS})
  target_include_directories(${fused} PRIVATE ${JPA_GENERATED})
  target_compile_definitions(${fused} PRIVATE $<$<BOOL:${JPA_HAVE_SM90A}>:JPA_HAVE_SM90A>)

  set(cache jpa_cache_cuda${suffix})
  add_library(${cache} STATIC cpp/cache/move_rows.cu cpp/cache/write.cu)

  foreach(engine IN ITEMS ${cublaslt} ${fused} ${cache})
    target_link_libraries(${engine} PUBLIC jpa_core $<BUILD_INTERFACE:${flags}>)
  endforeach()

  set(ffi jpa_ffi_cuda${suffix})
  add_library(${ffi} STATIC ${JPA_FFI_CUDA_SOURCES})
  target_include_directories(${ffi} SYSTEM PRIVATE "${JPA_XLA_INCLUDE_DIR}")
  target_link_libraries(${ffi} PUBLIC ${cublaslt} ${fused} ${cache})

  set(module _cuda${suffix})
  nanobind_add_module(${module} STABLE_ABI NB_STATIC NB_SUPPRESS_WARNINGS cpp/ffi/module_cuda.cc)
  target_compile_definitions(${module} PRIVATE
    JPA_MODULE=${module}
    "JPA_COMPILER=\"${JPA_CUDA${version}_COMPILER}\""
    "JPA_CUDA_ARCHITECTURES=\"${JPA_ARCHITECTURE_NAMES}\"")
  target_link_libraries(${module} PRIVATE ${ffi})
  set_target_properties(${module} PROPERTIES LINKER_LANGUAGE CXX)
  install(TARGETS ${module} LIBRARY DESTINATION jax_paged_attn)
endfunction()
