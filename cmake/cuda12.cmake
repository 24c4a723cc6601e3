# Finds the parts that build the module for CUDA 12: the front end of CUDA 13's nvcc, and all else of CUDA 12.9.
#
# No package on PyPI has an nvcc 12; those of CUDA 12.9 have its headers, its static runtime and ptxas. CUDA_COMPILER_LAUNCHER
# puts cuda12_nvcc in front of each compilation, which makes nvcc take
#
# - headers and ptxas of CUDA 12.9, so that machine code is what drivers of CUDA 12 load,
# - crt/ of CUDA 13, headers between the code that nvcc itself writes and the runtime, whose functions are the same,
# - cuda12_cicc as its compiler from C++ to PTX: that of CUDA 13, whose PTX then says that it is version 8.8, CUDA 12.9's.
#   ptxas refuses the instructions that this version does not have.

set(JPA_CUDA12_PTX_VERSION 8.8)

foreach(package IN ITEMS cuda_nvcc cuda_runtime cuda_cccl cublas)
  jpa_find_nvidia_package(${package} JPA_CUDA12_${package})
  if(NOT JPA_CUDA12_${package})
    string(REPLACE _ - package "nvidia-${package}-cu12")
    message(FATAL_ERROR "JPA_CUDA12=ON: needs the package ${package} ==12.9.*")
  endif()
endforeach()

execute_process(COMMAND "${JPA_CUDA12_cuda_nvcc}/bin/ptxas" --version
  OUTPUT_VARIABLE JPA_CUDA12_PTXAS COMMAND_ERROR_IS_FATAL ANY)
if(NOT JPA_CUDA12_PTXAS MATCHES "V(12\\.9\\.[0-9]+)")
  message(FATAL_ERROR "JPA_CUDA12=ON: needs the package nvidia-cuda-nvcc-cu12 ==12.9.*, got ${JPA_CUDA12_PTXAS}")
endif()
set(JPA_CUDA12_COMPILER "nvcc ${CMAKE_CUDA_COMPILER_VERSION} with ptxas ${CMAKE_MATCH_1}")

set(JPA_CUDA12_TOOLS "${CMAKE_BINARY_DIR}/cuda12")
foreach(tool IN ITEMS nvcc cicc)
  configure_file(cmake/cuda12_${tool}.in "${JPA_CUDA12_TOOLS}/${tool}" @ONLY
    FILE_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
endforeach()
file(MAKE_DIRECTORY "${JPA_CUDA12_TOOLS}/include")
foreach(header IN ITEMS crt fatbinary_section.h)
  file(CREATE_LINK "${JPA_TOOLKIT}/include/${header}" "${JPA_CUDA12_TOOLS}/include/${header}" SYMBOLIC)
endforeach()

set(JPA_CUDA12_LAUNCHER "${JPA_CUDA12_TOOLS}/nvcc")
set(JPA_CUDA12_CUDART "${JPA_CUDA12_cuda_runtime}/lib/libcudart_static.a")
set(JPA_CUDA12_INCLUDE_DIRS
  "${JPA_CUDA12_cuda_runtime}/include" "${JPA_CUDA12_cuda_cccl}/include" "${JPA_CUDA12_cublas}/include"
  "${JPA_CUDA12_TOOLS}/include")
