# Finds nvcc, the static CUDA runtimes and cublasLt.h, and enables the language CUDA.
#
# Sets JPA_CUDA_MODULES, the major versions of CUDA to build a module for, and for each what cmake/cuda_module.cmake reads. An
# installed toolkit comes first; what it lacks is taken from NVIDIA's packages on PyPI where the build's Python has them
# (JPA_CUDA=ON makes them build requirements, see tools/build_backend.py). Those of CUDA 13 all unpack into one folder,
# nvidia/cu13.

set(JPA_CUDA_MODULES)
if(JPA_CUDA STREQUAL "OFF" AND NOT JPA_CUDA12)
  return()
endif()

function(jpa_without_cuda reason)
  if(JPA_CUDA STREQUAL "ON" OR JPA_CUDA12)
    message(FATAL_ERROR "JPA_CUDA=${JPA_CUDA}, JPA_CUDA12=${JPA_CUDA12}: ${reason}")
  endif()
  message(STATUS "Building without a CUDA module: ${reason}")
endfunction()

# The folder of one of NVIDIA's packages, by its name in Python; empty if the build's Python does not have it.
function(jpa_find_nvidia_package name variable)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('nvidia') and u.find_spec('nvidia.${name}'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${variable} "${folder}" PARENT_SCOPE)
endfunction()

jpa_find_nvidia_package(cu13 JPA_PYPI_CUDA)

if(NOT CMAKE_CUDA_COMPILER)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  else()
    find_program(JPA_NVCC nvcc PATHS /usr/local/cuda/bin)
    if(NOT JPA_NVCC AND JPA_PYPI_CUDA)
      find_program(JPA_NVCC nvcc PATHS "${JPA_PYPI_CUDA}/bin" NO_DEFAULT_PATH)
    endif()
    if(NOT JPA_NVCC)
      jpa_without_cuda("no nvcc was found")
      return()
    endif()
    set(CMAKE_CUDA_COMPILER "${JPA_NVCC}")
  endif()
endif()

# Where nvcc itself says its toolkit is: it may be a link or a script.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --dryrun -c -x cu /dev/null ERROR_VARIABLE JPA_NVCC_DRYRUN OUTPUT_QUIET)
string(REGEX MATCH "_HERE_=([^\n]+)" JPA_NVCC_HERE "${JPA_NVCC_DRYRUN}")
get_filename_component(JPA_TOOLKIT "${CMAKE_MATCH_1}/.." ABSOLUTE)

find_library(JPA_CUDART_LIBRARY cudart_static
  PATHS "${JPA_TOOLKIT}/lib64" "${JPA_TOOLKIT}/lib" "${JPA_TOOLKIT}/targets/x86_64-linux/lib"
        "${JPA_TOOLKIT}/targets/sbsa-linux/lib" "${JPA_PYPI_CUDA}/lib"
  NO_DEFAULT_PATH)
if(NOT JPA_CUDART_LIBRARY)
  jpa_without_cuda("no libcudart_static.a beside ${CMAKE_CUDA_COMPILER}")
  return()
endif()

if(NOT JPA_CUDA STREQUAL "OFF")
  find_path(JPA_CUBLAS_INCLUDE_DIR cublasLt.h
    PATHS "${JPA_TOOLKIT}/include" "${JPA_PYPI_CUDA}/include" NO_DEFAULT_PATH)
  if(NOT JPA_CUBLAS_INCLUDE_DIR)
    jpa_without_cuda("no cublasLt.h in ${JPA_TOOLKIT}/include, nor from the package nvidia-cublas")
    return()
  endif()
  file(STRINGS "${JPA_CUBLAS_INCLUDE_DIR}/cublasLt.h" JPA_POINTER_ARRAYS REGEX "CUBLASLT_BATCH_MODE_POINTER_ARRAY = ")
  file(STRINGS "${JPA_CUBLAS_INCLUDE_DIR}/cublas_api.h" JPA_CUBLAS_MAJOR REGEX "#define CUBLAS_VER_MAJOR 13$")
  if(NOT JPA_POINTER_ARRAYS OR NOT JPA_CUBLAS_MAJOR)
    jpa_without_cuda("cublasLt.h of ${JPA_CUBLAS_INCLUDE_DIR} is not cuBLAS 13's")
    return()
  endif()
endif()

# Ours are compiled for JPA_CUDA_ARCHITECTURES; CMake's own try-outs need nothing but to link.
set(CMAKE_CUDA_ARCHITECTURES OFF)
get_filename_component(JPA_CUDART_DIR "${JPA_CUDART_LIBRARY}" DIRECTORY)
set(CMAKE_CUDA_FLAGS_INIT "-L${JPA_CUDART_DIR}")
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
enable_language(CUDA)
# CMake before 3.26 does not know that nvcc compiles C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

if(NOT JPA_CUDA STREQUAL "OFF")
  list(APPEND JPA_CUDA_MODULES 13)
  set(JPA_CUDA13_INCLUDE_DIRS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} "${JPA_CUBLAS_INCLUDE_DIR}")
  set(JPA_CUDA13_CUDART "${JPA_CUDART_LIBRARY}")
  set(JPA_CUDA13_COMPILER "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
if(JPA_CUDA12)
  include(cmake/cuda12.cmake)
  list(APPEND JPA_CUDA_MODULES 12)
endif()
foreach(version IN LISTS JPA_CUDA_MODULES)
  message(STATUS "Module for CUDA ${version}: ${JPA_CUDA${version}_COMPILER} for ${JPA_CUDA_ARCHITECTURES}, headers of "
                 "${JPA_CUDA${version}_INCLUDE_DIRS}")
endforeach()
