#include "ffi/handler_cpu.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "cache/write.h"
#include "core/workspace.h"
#include "engines/cpu/isa.h"
#include "engines/cpu/run.h"
#include "ffi/bind.h"
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

constexpr Target kV1 = {.platform = Platform::kCpu, .version = 1};
constexpr Target kV2 = {.platform = Platform::kCpu, .version = 2};
constexpr Target kV3 = {.platform = Platform::kCpu, .version = 3};
constexpr Target kV4 = {.platform = Platform::kCpu, .version = 4};

template <Target target>
ffi::Error Attention(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     ffi::Dictionary dictionary) {
  return Guard([&] {
    AttentionTensors tensors;
    AttentionAttributes attributes;
    AttentionProblem problem;
    AttentionParams params;
    if (Status s = AttentionTensors::Bind(target, args, rets, &tensors); !s.ok()) return s;
    if (Status s = ReadAttributes(dictionary, target, &attributes); !s.ok()) return s;
    if (Status s = ParseAttention(tensors, target, attributes, &problem, &params); !s.ok()) return s;
    const int64_t workspace_bytes =
        AttentionWorkspaceBytes(problem.num_seqs, problem.num_q_heads, problem.value_dim);
    if (Status s = Expect(tensors["workspace"], {workspace_bytes}); !s.ok()) return s;
    const cpu::Kernels* kernels;
    if (Status s = cpu::ChosenKernels(&kernels); !s.ok()) return s;
    XlaTaskRunner runner(pool);
    return cpu::RunAttention(problem, params, *kernels, runner);
  });
}

template <Target target>
ffi::Error Write(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 ffi::Dictionary dictionary) {
  return Guard([&] {
    WriteTensors tensors;
    WriteAttributes attributes;
    WriteProblem problem;
    WriteParams params;
    if (Status s = WriteTensors::Bind(target, args, rets, &tensors); !s.ok()) return s;
    if (Status s = ReadAttributes(dictionary, target, &attributes); !s.ok()) return s;
    if (Status s = ParseWrite(tensors, target, attributes, &problem, &params); !s.ok()) return s;
    XlaTaskRunner runner(pool);
    return cache::RunWrite(problem, params, runner);
  });
}

// Operands, results and attributes: targets.h.
auto BindCall() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs<ffi::Dictionary>();
}

XLA_FFI_DEFINE_HANDLER(kAttentionV1Handler, Attention<kV1>, BindCall());
XLA_FFI_DEFINE_HANDLER(kAttentionV2Handler, Attention<kV2>, BindCall());
XLA_FFI_DEFINE_HANDLER(kAttentionV3Handler, Attention<kV3>, BindCall());
XLA_FFI_DEFINE_HANDLER(kAttentionV4Handler, Attention<kV4>, BindCall());
XLA_FFI_DEFINE_HANDLER(kWriteV1Handler, Write<kV1>, BindCall());
XLA_FFI_DEFINE_HANDLER(kWriteV2Handler, Write<kV2>, BindCall());
XLA_FFI_DEFINE_HANDLER(kWriteV3Handler, Write<kV3>, BindCall());

}  // namespace

void* AttentionV1CpuHandler() { return reinterpret_cast<void*>(kAttentionV1Handler); }
void* AttentionV2CpuHandler() { return reinterpret_cast<void*>(kAttentionV2Handler); }
void* AttentionV3CpuHandler() { return reinterpret_cast<void*>(kAttentionV3Handler); }
void* AttentionV4CpuHandler() { return reinterpret_cast<void*>(kAttentionV4Handler); }
void* WriteV1CpuHandler() { return reinterpret_cast<void*>(kWriteV1Handler); }
void* WriteV2CpuHandler() { return reinterpret_cast<void*>(kWriteV2Handler); }
void* WriteV3CpuHandler() { return reinterpret_cast<void*>(kWriteV3Handler); }

std::string FfiApiVersion() {
  return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
}

}  // namespace jpa
