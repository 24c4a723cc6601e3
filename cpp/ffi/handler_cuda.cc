#include "ffi/handler_cuda.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "device/cuda_status.h"
#include "engines/cublaslt/run.h"
#include "engines/fused/run.h"
#include "ffi/bind.h"
#include "ffi/guard.h"
#include "ffi/parse.h"

namespace jpa {
namespace {

constexpr Target kV1 = {.platform = Platform::kCuda, .version = 1};
constexpr Target kV2 = {.platform = Platform::kCuda, .version = 2};
constexpr Target kV3 = {.platform = Platform::kCuda, .version = 3};
constexpr Target kV4 = {.platform = Platform::kCuda, .version = 4};
constexpr Target kV5 = {.platform = Platform::kCuda, .version = 5};

std::atomic<int64_t> host_calls{0};

bool IsFused(const AttentionAttributes& attributes) { return attributes.engine == "fused"; }

// The state of a call site of a compiled program, shared by threads. Sizes of a call site never change, so
// what its engine prepares once per device stays valid.
class AttentionState {
 public:
  static ffi::TypeId id;

  struct OnDevice {
    fused::Device fused;
    cublaslt::Plan plan;
    std::unique_ptr<cublaslt::Products> products;
  };

  // For the current device. Costs a lock and a look-up after the first call there.
  Status Get(const AttentionProblem& problem, const AttentionAttributes& attributes, const OnDevice** found) {
    int device = 0;
    if (Status s = device::CudaStatus(cudaGetDevice(&device), "attention", "no current CUDA device"); !s.ok())
      return s;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<OnDevice>& here = devices_[device];
    if (here == nullptr) {
      auto made = std::make_unique<OnDevice>();
      if (Status s = Make(problem, attributes, made.get()); !s.ok()) return s;
      here = std::move(made);
    }
    *found = here.get();
    return Status::Ok();
  }

 private:
  static Status Make(const AttentionProblem& problem, const AttentionAttributes& attributes, OnDevice* made) {
    if (IsFused(attributes)) return fused::Prepare(problem, &made->fused);
    made->plan = cublaslt::MakePlan(problem, attributes.decode, attributes.workspace_limit);
    return cublaslt::Products::Make(problem, made->plan, &made->products);
  }

  std::mutex mutex_;
  std::map<int, std::unique_ptr<OnDevice>> devices_;
};

ffi::TypeId AttentionState::id = {};
constexpr ffi::TypeInfo kStateInfo = ffi::MakeTypeInfo<AttentionState>();

// One call, parsed.
struct ParsedCall {
  AttentionProblem problem;
  AttentionParams params;
  AttentionAttributes attributes;
  int64_t workspace_bytes;
};

Status CheckEngine(const AttentionAttributes& attributes, const Target& target) {
  if (!IsFused(attributes) && attributes.engine != "cublaslt") {
    return Status::InvalidArgument("implementation: expected fused or cublaslt, got " +
                                   std::string(attributes.engine));
  }
  if (target.version >= kCumulativeSince && !IsFused(attributes)) {
    return Status::InvalidArgument("cu_q_lens: expected implementation fused, got " +
                                   std::string(attributes.engine));
  }
  if (attributes.batch_invariant && !IsFused(attributes)) {
    return Status::InvalidArgument("batch_invariant: expected implementation fused, got " +
                                   std::string(attributes.engine));
  }
  if (attributes.workspace_limit < 0) {
    return Status::InvalidArgument("workspace_limit: expected a number >= 0, got " +
                                   std::to_string(attributes.workspace_limit));
  }
  return Status::Ok();
}

Status Parse(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
             const ffi::Dictionary& dictionary, const Target& target, ParsedCall* call) {
  AttentionTensors tensors;
  if (Status s = AttentionTensors::Bind(target, args, rets, &tensors); !s.ok()) return s;
  if (Status s = ReadAttributes(dictionary, target, &call->attributes); !s.ok()) return s;
  if (Status s = CheckEngine(call->attributes, target); !s.ok()) return s;
  if (Status s = ParseAttention(tensors, target, call->attributes, &call->problem, &call->params); !s.ok())
    return s;
  if (call->problem.has_token_scales && IsFused(call->attributes)) {
    return Status::InvalidArgument(
        "k_token_scales, v_token_scales: expected none with implementation fused, got some");
  }
  if (call->problem.num_padding_columns > 0 && !IsFused(call->attributes)) {
    return Status::InvalidArgument("k_pages: expected keys without padding with implementation cublaslt");
  }
  call->workspace_bytes = tensors["workspace"].dim(0);
  return Status::Ok();
}

ffi::ErrorOr<std::unique_ptr<AttentionState>> Instantiate() { return std::make_unique<AttentionState>(); }

// Before the first execution on a device, and never while a graph is being captured.
template <Target target>
ffi::Error Initialize(AttentionState* state, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      ffi::Dictionary dictionary) {
  return Guard([&] {
    ParsedCall call;
    if (Status s = Parse(args, rets, dictionary, target, &call); !s.ok()) return s;
    const AttentionState::OnDevice* device;
    return state->Get(call.problem, call.attributes, &device);
  });
}

template <Target target>
ffi::Error Execute(cudaStream_t stream, AttentionState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary dictionary) {
  return Guard([&] {
    host_calls.fetch_add(1, std::memory_order_relaxed);
    ParsedCall call;
    if (Status s = Parse(args, rets, dictionary, target, &call); !s.ok()) return s;
    const AttentionState::OnDevice* device;
    if (Status s = state->Get(call.problem, call.attributes, &device); !s.ok()) return s;
    if (IsFused(call.attributes)) {
      const fused::Options options = {.decode = call.attributes.decode,
                                      .batch_invariant = call.attributes.batch_invariant,
                                      .cumulative = target.version >= kCumulativeSince,
                                      .workspace_limit = call.attributes.workspace_limit};
      return fused::RunAttention(call.problem, call.params, options, device->fused, call.workspace_bytes,
                                 stream);
    }
    return cublaslt::RunAttention(call.problem, call.params, device->plan, *device->products,
                                  call.workspace_bytes, stream);
  });
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate, ffi::Ffi::BindInstantiate());

// Operands, results and attributes: targets.h.
auto BindInitialize() {
  return ffi::Ffi::BindInitialize()
      .Ctx<ffi::State<AttentionState>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<ffi::Dictionary>();
}

auto BindExecute() {
  return ffi::Ffi::BindExecute()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::State<AttentionState>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<ffi::Dictionary>();
}

XLA_FFI_DEFINE_HANDLER(kInitializeV1, Initialize<kV1>, BindInitialize());
XLA_FFI_DEFINE_HANDLER(kInitializeV2, Initialize<kV2>, BindInitialize());
XLA_FFI_DEFINE_HANDLER(kInitializeV3, Initialize<kV3>, BindInitialize());
XLA_FFI_DEFINE_HANDLER(kInitializeV4, Initialize<kV4>, BindInitialize());
XLA_FFI_DEFINE_HANDLER(kInitializeV5, Initialize<kV5>, BindInitialize());

// The same launches at every call of a compiled program, whatever the arrays hold, so a command buffer may
// hold them.
XLA_FFI_DEFINE_HANDLER(kExecuteV1, Execute<kV1>, BindExecute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteV2, Execute<kV2>, BindExecute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteV3, Execute<kV3>, BindExecute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteV4, Execute<kV4>, BindExecute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteV5, Execute<kV5>, BindExecute(), {ffi::Traits::kCmdBufferCompatible});

AttentionCudaHandlers Handlers(XLA_FFI_Handler* initialize, XLA_FFI_Handler* execute) {
  return {.instantiate = reinterpret_cast<void*>(kInstantiate),
          .initialize = reinterpret_cast<void*>(initialize),
          .execute = reinterpret_cast<void*>(execute)};
}

}  // namespace

AttentionCudaHandlers AttentionV1CudaHandlers() { return Handlers(kInitializeV1, kExecuteV1); }
AttentionCudaHandlers AttentionV2CudaHandlers() { return Handlers(kInitializeV2, kExecuteV2); }
AttentionCudaHandlers AttentionV3CudaHandlers() { return Handlers(kInitializeV3, kExecuteV3); }
AttentionCudaHandlers AttentionV4CudaHandlers() { return Handlers(kInitializeV4, kExecuteV4); }
AttentionCudaHandlers AttentionV5CudaHandlers() { return Handlers(kInitializeV5, kExecuteV5); }

AttentionCudaStateType GetAttentionCudaStateType() {
  return {.id = &AttentionState::id, .info = const_cast<ffi::TypeInfo*>(&kStateInfo)};
}

int64_t AttentionCudaHostCalls() { return host_calls.load(std::memory_order_relaxed); }

std::string CudaFfiApiVersion() {
  return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
}

}  // namespace jpa
