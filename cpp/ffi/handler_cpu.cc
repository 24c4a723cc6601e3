#include "ffi/handler_cpu.h"

#include <algorithm>
#include <functional>
#include <string_view>
#include <utility>

#include "cache/write.h"
#include "core/workspace.h"
#include "engines/cpu/isa.h"
#include "engines/cpu/run.h"
#include "ffi/guard.h"
#include "ffi/parse.h"

namespace jpa {
namespace {

class XlaTaskRunner : public TaskRunner {
 public:
  explicit XlaTaskRunner(ffi::ThreadPool& pool) : pool_(pool) {}

  int num_threads() const override { return static_cast<int>(std::max<int64_t>(pool_.num_threads(), 1)); }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

// The layout is an attribute of v2; v1 means "split".
template <typename... Layout>
ffi::Error Attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages,
                     ffi::AnyBuffer block_tables, ffi::AnyBuffer kv_lens, ffi::AnyBuffer q_starts,
                     ffi::AnyBuffer q_counts, ffi::AnyBuffer sinks, ffi::AnyBuffer k_scale,
                     ffi::AnyBuffer v_scale, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                     ffi::Result<ffi::AnyBuffer> workspace, float scale, float soft_cap,
                     int64_t sliding_window, bool causal, Layout... layout) {
  return Guard([&] {
    const AttentionBuffers buffers = {{"q", q},
                                      {"k_pages", k_pages},
                                      {"v_pages", v_pages},
                                      {"block_tables", block_tables},
                                      {"kv_lens", kv_lens},
                                      {"q_starts", q_starts},
                                      {"q_counts", q_counts},
                                      {"sinks", sinks},
                                      {"k_scale", k_scale},
                                      {"v_scale", v_scale},
                                      {"out", *out},
                                      {"lse", *lse},
                                      {"workspace", *workspace}};
    AttentionAttributes attributes = {scale, soft_cap, sliding_window, causal, false, "split"};
    ((attributes.layout = layout), ...);
    AttentionProblem problem;
    AttentionParams params;
    if (Status s = ParseAttention(buffers, attributes, &problem, &params); !s.ok()) return s;
    const int64_t workspace_bytes =
        AttentionWorkspaceBytes(problem.num_seqs, problem.num_q_heads, problem.head_dim);
    if (Status s = Expect(buffers.workspace, ffi::DataType::U8, {workspace_bytes}); !s.ok()) return s;
    const cpu::Kernels* kernels;
    if (Status s = cpu::ChosenKernels(&kernels); !s.ok()) return s;
    XlaTaskRunner runner(pool);
    return cpu::RunAttention(problem, params, *kernels, runner);
  });
}

ffi::Error Write(ffi::ThreadPool pool, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, ffi::AnyBuffer k,
                 ffi::AnyBuffer v, ffi::AnyBuffer slot_mapping, ffi::AnyBuffer k_scale,
                 ffi::AnyBuffer v_scale, ffi::Result<ffi::AnyBuffer> k_pages_out,
                 ffi::Result<ffi::AnyBuffer> v_pages_out) {
  return Guard([&] {
    const WriteBuffers buffers = {{"k_pages", k_pages},
                                  {"v_pages", v_pages},
                                  {"k", k},
                                  {"v", v},
                                  {"slot_mapping", slot_mapping},
                                  {"k_scale", k_scale},
                                  {"v_scale", v_scale},
                                  {"k_pages (result)", *k_pages_out},
                                  {"v_pages (result)", *v_pages_out}};
    WriteProblem problem;
    WriteParams params;
    if (Status s = ParseWrite(buffers, &problem, &params); !s.ok()) return s;
    XlaTaskRunner runner(pool);
    return cache::RunWrite(problem, params, runner);
  });
}

auto BindAttentionV1() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // q
      .Arg<ffi::AnyBuffer>()  // k_pages
      .Arg<ffi::AnyBuffer>()  // v_pages
      .Arg<ffi::AnyBuffer>()  // block_tables
      .Arg<ffi::AnyBuffer>()  // kv_lens
      .Arg<ffi::AnyBuffer>()  // q_starts
      .Arg<ffi::AnyBuffer>()  // q_counts
      .Arg<ffi::AnyBuffer>()  // sinks
      .Arg<ffi::AnyBuffer>()  // k_scale
      .Arg<ffi::AnyBuffer>()  // v_scale
      .Ret<ffi::AnyBuffer>()  // out
      .Ret<ffi::AnyBuffer>()  // lse
      .Ret<ffi::AnyBuffer>()  // workspace
      .Attr<float>("scale")
      .Attr<float>("soft_cap")
      .Attr<int64_t>("sliding_window")
      .Attr<bool>("causal");
}

XLA_FFI_DEFINE_HANDLER(kAttentionV1, Attention<>, BindAttentionV1());

XLA_FFI_DEFINE_HANDLER(kAttentionV2, Attention<std::string_view>,
                       BindAttentionV1().Attr<std::string_view>("layout"));

XLA_FFI_DEFINE_HANDLER(kWrite, Write,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()  // k_pages
                           .Arg<ffi::AnyBuffer>()  // v_pages
                           .Arg<ffi::AnyBuffer>()  // k
                           .Arg<ffi::AnyBuffer>()  // v
                           .Arg<ffi::AnyBuffer>()  // slot_mapping
                           .Arg<ffi::AnyBuffer>()  // k_scale
                           .Arg<ffi::AnyBuffer>()  // v_scale
                           .Ret<ffi::AnyBuffer>()  // k_pages, aliased
                           .Ret<ffi::AnyBuffer>()  // v_pages, aliased
);

}  // namespace

void* AttentionV1CpuHandler() { return reinterpret_cast<void*>(kAttentionV1); }
void* AttentionV2CpuHandler() { return reinterpret_cast<void*>(kAttentionV2); }
void* WriteCpuHandler() { return reinterpret_cast<void*>(kWrite); }

std::string FfiApiVersion() {
  return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
}

}  // namespace jpa
