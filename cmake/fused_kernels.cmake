# Makes everything that follows from JPA_FUSED_DECODE_HEAD_DIMS and JPA_FUSED_PREFILL_HEAD_DIMS:
#
# - JPA_FUSED_INSTANTIATIONS: one source file per kernel, so that they compile side by side
# - engines/fused/head_dims.h in JPA_GENERATED, from which cpp/engines/fused chooses a kernel
# - jax_paged_attn/_head_dims.py, which is checked in: Python has to know the list where nothing was compiled
#
# configure_file writes a file only if its contents change.

set(JPA_GENERATED ${CMAKE_BINARY_DIR}/generated)
string(JOIN ", " JPA_DECODE_HEAD_DIMS ${JPA_FUSED_DECODE_HEAD_DIMS})
string(JOIN ", " JPA_PREFILL_HEAD_DIMS ${JPA_FUSED_PREFILL_HEAD_DIMS})
configure_file(cpp/engines/fused/head_dims.h.in ${JPA_GENERATED}/engines/fused/head_dims.h @ONLY)
configure_file(cmake/head_dims.py.in ${CMAKE_CURRENT_SOURCE_DIR}/jax_paged_attn/_head_dims.py @ONLY)

set(JPA_FUSED_INSTANTIATIONS)
foreach(JPA_HEAD_DIM IN LISTS JPA_FUSED_DECODE_HEAD_DIMS)
  set(instantiation ${JPA_GENERATED}/engines/fused/decode/head_dim_${JPA_HEAD_DIM}.cu)
  configure_file(cpp/engines/fused/decode/instantiation.cu.in ${instantiation} @ONLY)
  list(APPEND JPA_FUSED_INSTANTIATIONS ${instantiation})
endforeach()
foreach(JPA_HEAD_DIM IN LISTS JPA_FUSED_PREFILL_HEAD_DIMS)
  # The values of the enum Loader.
  foreach(JPA_LOADER kTma kCpAsync)
    set(instantiation ${JPA_GENERATED}/engines/fused/prefill/head_dim_${JPA_HEAD_DIM}_${JPA_LOADER}.cu)
    configure_file(cpp/engines/fused/prefill/instantiation.cu.in ${instantiation} @ONLY)
    list(APPEND JPA_FUSED_INSTANTIATIONS ${instantiation})
  endforeach()
endforeach()
