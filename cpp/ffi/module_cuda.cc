// The Python modules jax_paged_attn._cuda and _cuda12: what to register with XLA, and what was built. They
// load without a GPU.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "core/dtype_name.h"
#include "core/layout_name.h"
#include "engines/cublaslt/library.h"
#include "engines/cublaslt/plan.h"
#include "engines/fused/run.h"
#include "ffi/handler_cuda.h"
#include "ffi/handler_write_cuda.h"
#include "ffi/module_targets.h"

namespace nb = nanobind;

namespace {

nb::dict Stages(const jpa::AttentionCudaHandlers& attention) {
  nb::dict stages;
  stages["instantiate"] = nb::capsule(attention.instantiate);
  stages["initialize"] = nb::capsule(attention.initialize);
  stages["execute"] = nb::capsule(attention.execute);
  return stages;
}

nb::dict Registrations() {
  nb::dict targets;
  targets[jpa::kAttentionV1] = Stages(jpa::AttentionV1CudaHandlers());
  targets[jpa::kAttentionV2] = Stages(jpa::AttentionV2CudaHandlers());
  targets[jpa::kAttentionV3] = Stages(jpa::AttentionV3CudaHandlers());
  targets[jpa::kAttentionV4] = Stages(jpa::AttentionV4CudaHandlers());
  targets[jpa::kAttentionV5] = Stages(jpa::AttentionV5CudaHandlers());
  targets[jpa::kWriteV1] = nb::capsule(jpa::WriteV1CudaHandler());
  targets[jpa::kWriteV2] = nb::capsule(jpa::WriteV2CudaHandler());
  targets[jpa::kWriteV3] = nb::capsule(jpa::WriteV3CudaHandler());
  return targets;
}

nb::dict Types() {
  const jpa::AttentionCudaStateType state = jpa::GetAttentionCudaStateType();
  nb::dict registration;
  registration["type_id"] = nb::capsule(state.id);
  registration["type_info"] = nb::capsule(state.info);
  nb::dict types;
  types["jax_paged_attn.attention.v1.state"] = registration;
  return types;
}

jpa::DType DTypeOf(const std::string& name) {
  for (const jpa::DType dtype : {jpa::DType::kF32, jpa::DType::kBF16, jpa::DType::kF16, jpa::DType::kE4M3FN,
                                 jpa::DType::kE5M2, jpa::DType::kS8}) {
    if (name == jpa::Name(dtype)) return dtype;
  }
  throw std::invalid_argument(
      "dtype: expected float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8, got " + name);
}

jpa::PageLayout LayoutOf(const std::string& name) {
  jpa::PageLayout layout{};
  if (const jpa::Status s = jpa::ParseLayout(name, &layout); !s.ok())
    throw std::invalid_argument(s.message());
  return layout;
}

nb::dict AttentionPlan(const std::string& q_dtype, const std::string& kv_dtype, int64_t num_rows,
                       int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t value_dim,
                       int64_t page_size, int64_t num_seqs, int64_t max_pages, bool decode,
                       int64_t workspace_limit, const std::string& layout, int64_t num_padding_heads,
                       bool token_scales) {
  const jpa::AttentionProblem problem = {.q_dtype = DTypeOf(q_dtype),
                                         .kv_dtype = DTypeOf(kv_dtype),
                                         .num_rows = num_rows,
                                         .num_q_heads = num_q_heads,
                                         .num_kv_heads = num_kv_heads,
                                         .head_dim = head_dim,
                                         .value_dim = value_dim,
                                         .page_size = page_size,
                                         .num_seqs = num_seqs,
                                         .max_pages = max_pages,
                                         .layout = LayoutOf(layout),
                                         .num_padding_heads = num_padding_heads,
                                         .has_token_scales = token_scales};
  const jpa::cublaslt::Plan plan = jpa::cublaslt::MakePlan(problem, decode, workspace_limit);
  nb::dict result;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["launches"] = plan.launches();
  result["in_place"] = plan.in_place;
  result["row_block_rows"] = plan.row_block_rows;
  result["row_blocks"] = plan.row_blocks;
  result["groups"] = plan.groups;
  result["chunk_row_blocks"] = plan.chunk_row_blocks;
  result["gathered"] = plan.gathered;
  result["block_keys"] = plan.block_keys;
  result["segment_keys"] = plan.segment_keys();
  result["stretch_keys"] = plan.stretch_keys();
  result["stretches"] = plan.stretches;
  return result;
}

// A call of any number of rows, sequences and pages.
jpa::AttentionProblem ProblemOfOneRow(const std::string& q_dtype, const std::string& kv_dtype,
                                      int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
                                      int64_t value_dim, int64_t page_size) {
  return {.q_dtype = DTypeOf(q_dtype),
          .kv_dtype = DTypeOf(kv_dtype),
          .num_rows = 1,
          .num_q_heads = num_q_heads,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .value_dim = value_dim,
          .page_size = page_size,
          .num_seqs = 1,
          .max_pages = 1};
}

int64_t WorkspaceBound(const std::string& q_dtype, const std::string& kv_dtype, int64_t num_q_heads,
                       int64_t num_kv_heads, int64_t head_dim, int64_t value_dim, int64_t page_size,
                       int64_t workspace_limit, const std::string& layout, int64_t num_padding_heads,
                       bool token_scales) {
  jpa::AttentionProblem problem =
      ProblemOfOneRow(q_dtype, kv_dtype, num_q_heads, num_kv_heads, head_dim, value_dim, page_size);
  problem.layout = LayoutOf(layout);
  problem.num_padding_heads = num_padding_heads;
  problem.has_token_scales = token_scales;
  return jpa::cublaslt::WorkspaceBound(problem, workspace_limit);
}

int64_t FusedWorkspaceBytes(const std::string& q_dtype, const std::string& kv_dtype, int64_t num_rows,
                            int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, int64_t value_dim,
                            int64_t page_size, int64_t num_seqs, int64_t max_pages, bool decode,
                            bool batch_invariant, int64_t workspace_limit, bool cumulative) {
  const jpa::AttentionProblem problem = {.q_dtype = DTypeOf(q_dtype),
                                         .kv_dtype = DTypeOf(kv_dtype),
                                         .num_rows = num_rows,
                                         .num_q_heads = num_q_heads,
                                         .num_kv_heads = num_kv_heads,
                                         .head_dim = head_dim,
                                         .value_dim = value_dim,
                                         .page_size = page_size,
                                         .num_seqs = num_seqs,
                                         .max_pages = max_pages};
  return jpa::fused::WorkspaceBytes(problem, {.decode = decode,
                                              .batch_invariant = batch_invariant,
                                              .cumulative = cumulative,
                                              .workspace_limit = workspace_limit});
}

int64_t FusedWorkspaceBound(const std::string& q_dtype, const std::string& kv_dtype, int64_t num_q_heads,
                            int64_t num_kv_heads, int64_t head_dim, int64_t value_dim, int64_t page_size,
                            bool decode, bool batch_invariant, int64_t workspace_limit, bool cumulative) {
  return jpa::fused::WorkspaceBound(
      ProblemOfOneRow(q_dtype, kv_dtype, num_q_heads, num_kv_heads, head_dim, value_dim, page_size),
      {.decode = decode,
       .batch_invariant = batch_invariant,
       .cumulative = cumulative,
       .workspace_limit = workspace_limit});
}

int64_t FusedWorkspaceBytesPerRow(int64_t num_q_heads, int64_t value_dim) {
  return jpa::fused::WorkspaceBytesPerRow(
      ProblemOfOneRow("bfloat16", "bfloat16", num_q_heads, num_q_heads, value_dim, value_dim, 1));
}

nb::dict BuildInfo() {
  nb::dict info;
  info["compiler"] = JPA_COMPILER;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = JPA_CUDA_ARCHITECTURES;
  info["ffi_api"] = jpa::CudaFfiApiVersion();
  return info;
}

}  // namespace

NB_MODULE(JPA_MODULE, m) {
  m.doc() = "The CUDA engines of jax_paged_attn: XLA FFI handlers and facts about the build.";
  m.def("registrations", &Registrations,
        nb::sig("def registrations() -> dict[str, object | dict[str, object]]"),
        "Handlers, or those of each stage, by the name of their FFI target, for platform \"CUDA\".");
  m.def("state_types", &Types, nb::sig("def state_types() -> dict[str, dict[str, object]]"),
        "Registrations of the types of state, by name.");
  jpa::DefineTargets(m, jpa::Platform::kCuda);
  m.def("attention_plan", &AttentionPlan, nb::arg("q_dtype"), nb::arg("kv_dtype"), nb::arg("num_rows"),
        nb::arg("num_q_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("value_dim"),
        nb::arg("page_size"), nb::arg("num_seqs"), nb::arg("max_pages"), nb::arg("decode"),
        nb::arg("workspace_limit"), nb::arg("layout") = "split", nb::arg("num_padding_heads") = 0,
        nb::arg("token_scales") = false,
        nb::sig("def attention_plan(q_dtype: str, kv_dtype: str, num_rows: int, num_q_heads: int, "
                "num_kv_heads: int, "
                "head_dim: int, value_dim: int, page_size: int, num_seqs: int, max_pages: int, decode: bool, "
                "workspace_limit: int, layout: str = 'split', num_padding_heads: int = 0, "
                "token_scales: bool = False) -> "
                "dict[str, int]"),
        "How \"cublaslt\" would run a call of these sizes: `workspace_bytes`, `launches`, and sizes of its "
        "parts.");
  m.def("workspace_bound", &WorkspaceBound, nb::arg("q_dtype"), nb::arg("kv_dtype"), nb::arg("num_q_heads"),
        nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("value_dim"), nb::arg("page_size"),
        nb::arg("workspace_limit"), nb::arg("layout") = "split", nb::arg("num_padding_heads") = 0,
        nb::arg("token_scales") = false,
        "At least the workspace of any such call, less WORKSPACE_BYTES_PER_ROW for each row and sequence.");
  m.def("fused_workspace_bytes", &FusedWorkspaceBytes, nb::arg("q_dtype"), nb::arg("kv_dtype"),
        nb::arg("num_rows"), nb::arg("num_q_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
        nb::arg("value_dim"), nb::arg("page_size"), nb::arg("num_seqs"), nb::arg("max_pages"),
        nb::arg("decode"), nb::arg("batch_invariant"), nb::arg("workspace_limit"),
        nb::arg("cumulative") = false,
        "Bytes of scratch memory that \"fused\" needs for a call of these sizes.");
  m.def("fused_workspace_bound", &FusedWorkspaceBound, nb::arg("q_dtype"), nb::arg("kv_dtype"),
        nb::arg("num_q_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("value_dim"),
        nb::arg("page_size"), nb::arg("decode"), nb::arg("batch_invariant"), nb::arg("workspace_limit"),
        nb::arg("cumulative") = false,
        "At least those of any such call, less what each row and sequence adds.");
  m.def("fused_workspace_bytes_per_row", &FusedWorkspaceBytesPerRow, nb::arg("num_q_heads"),
        nb::arg("value_dim"), "At most what a query row of a batch-invariant call adds to them.");
  m.attr("FUSED_CUMULATIVE_BYTES_PER_SEQUENCE") = jpa::fused::kCumulativeBytesPerSequence;
  m.attr("FUSED_WORKSPACE_BYTES_PER_SEQUENCE") = jpa::fused::kWorkspaceBytesPerSequence;
  m.attr("WORKSPACE_BYTES_PER_ROW") = jpa::cublaslt::kWorkspaceBytesPerRow;
  m.attr("DEFAULT_WORKSPACE_LIMIT") = jpa::cublaslt::kDefaultWorkspaceLimit;
  m.def("set_library_directory", &jpa::cublaslt::SetLibraryDirectory, nb::arg("directory"),
        "Where to look for cuBLASLt if neither the process nor the loader's search path has it.");
  m.def("host_calls", &jpa::AttentionCudaHostCalls,
        "How often XLA has called the attention handler in this process; replays of a CUDA graph do not.");
  m.def("build_info", &BuildInfo, nb::sig("def build_info() -> dict[str, str]"),
        "The compiler, the version of the CUDA runtime, the compute capabilities that kernels were compiled "
        "for, and the version of the XLA FFI headers.");
}
