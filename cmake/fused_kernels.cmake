# Makes everything that follows from JPA_FUSED_DECODE_HEAD_DIMS, JPA_FUSED_WARPGROUP_HEAD_DIMS, JPA_FUSED_PREFILL_HEAD_DIMS,
# JPA_FUSED_MLA_HEAD_DIMS and JPA_FUSED_WIDE_HEAD_DIMS:
#
# - JPA_FUSED_INSTANTIATIONS: one source file per kernel, so that they compile side by side
# - engines/fused/head_dims.h in JPA_GENERATED, from which cpp/engines/fused chooses a kernel
# - jax_paged_attn/_head_dims.py, which is checked in: Python has to know the list where nothing was compiled
#
# configure_file writes a file only if its contents change.

set(JPA_GENERATED ${CMAKE_BINARY_DIR}/generated)

# Sets JPA_HEAD_DIM and JPA_VALUE_DIM to those of an entry of the lists, and JPA_DIMS to a name for files.
macro(jpa_parse_head_dims entry)
  string(REPLACE : ";" parsed ${entry})
  list(GET parsed 0 JPA_HEAD_DIM)
  list(GET parsed -1 JPA_VALUE_DIM)
  string(REPLACE : _ JPA_DIMS ${entry})
endmacro()

foreach(kernel IN ITEMS DECODE WARPGROUP PREFILL MLA WIDE)
  set(pairs_cpp)
  set(pairs_py)
  foreach(entry IN LISTS JPA_FUSED_${kernel}_HEAD_DIMS)
    jpa_parse_head_dims(${entry})
    list(APPEND pairs_cpp "HeadDims<${JPA_HEAD_DIM}, ${JPA_VALUE_DIM}>")
    list(APPEND pairs_py "(${JPA_HEAD_DIM}, ${JPA_VALUE_DIM})")
  endforeach()
  string(JOIN ", " JPA_${kernel}_HEAD_DIMS_CPP ${pairs_cpp})
  string(JOIN ", " JPA_${kernel}_HEAD_DIMS_PY ${pairs_py})
  list(LENGTH pairs_py count)
  if(count EQUAL 1)
    string(APPEND JPA_${kernel}_HEAD_DIMS_PY ",")  # a tuple of one
  endif()
endforeach()
configure_file(cpp/engines/fused/head_dims.h.in ${JPA_GENERATED}/engines/fused/head_dims.h @ONLY)
configure_file(cmake/head_dims.py.in ${CMAKE_CURRENT_SOURCE_DIR}/jax_paged_attn/_head_dims.py @ONLY)

set(JPA_FUSED_INSTANTIATIONS)
# Adds the source `name` of a kernel, made of a template beside the kernel.
macro(jpa_instantiate kernel template name)
  set(instantiation ${JPA_GENERATED}/engines/fused/${kernel}/${name}.cu)
  configure_file(cpp/engines/fused/${kernel}/${template}.cu.in ${instantiation} @ONLY)
  list(APPEND JPA_FUSED_INSTANTIATIONS ${instantiation})
endmacro()
foreach(entry IN LISTS JPA_FUSED_DECODE_HEAD_DIMS)
  jpa_parse_head_dims(${entry})
  jpa_instantiate(decode instantiation instantiation_head_dim_${JPA_DIMS})
endforeach()
foreach(entry IN LISTS JPA_FUSED_WARPGROUP_HEAD_DIMS)
  jpa_parse_head_dims(${entry})
  jpa_instantiate(decode warpgroup_instantiation warpgroup_instantiation_head_dim_${JPA_DIMS})
endforeach()
# JPA_ROWS is the name of a number of packed rows.
foreach(entry IN LISTS JPA_FUSED_MLA_HEAD_DIMS)
  jpa_parse_head_dims(${entry})
  foreach(JPA_ROWS kMla8FewRows kMla8ManyRows)
    jpa_instantiate(mla8 instantiation head_dim_${JPA_DIMS}_${JPA_ROWS})
  endforeach()
endforeach()
# JPA_LOADER, JPA_VALUE_PLACE and JPA_SHARING are values of the enums of those names.
foreach(entry IN LISTS JPA_FUSED_PREFILL_HEAD_DIMS)
  jpa_parse_head_dims(${entry})
  foreach(JPA_LOADER kTma kCpAsync)
    jpa_instantiate(prefill instantiation head_dim_${JPA_DIMS}_${JPA_LOADER})
  endforeach()
endforeach()
function(jpa_add_mla_kernels JPA_VALUE_PLACE JPA_LOADER JPA_SHARING)
  foreach(entry IN LISTS ARGN)
    jpa_parse_head_dims(${entry})
    jpa_instantiate(mla instantiation head_dim_${JPA_DIMS}_${JPA_VALUE_PLACE}_${JPA_LOADER}_${JPA_SHARING})
  endforeach()
  set(JPA_FUSED_INSTANTIATIONS ${JPA_FUSED_INSTANTIATIONS} PARENT_SCOPE)
endfunction()
foreach(loader kTma kCpAsync)
  jpa_add_mla_kernels(kInKeys ${loader} kNone ${JPA_FUSED_MLA_HEAD_DIMS})
  jpa_add_mla_kernels(kOwnPool ${loader} kNone ${JPA_FUSED_WIDE_HEAD_DIMS})
endforeach()
jpa_add_mla_kernels(kOwnPool kTma kPairs ${JPA_FUSED_WIDE_HEAD_DIMS})
jpa_add_mla_kernels(kInKeys kTma kRows ${JPA_FUSED_MLA_HEAD_DIMS})
