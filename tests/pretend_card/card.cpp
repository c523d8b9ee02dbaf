// The device "card" of tests/pretend_card: torch's PrivateUse1 key, on tensors that lie in main memory. Every operator
// that would be a kernel lends its tensors to the CPU's kernel, after it has refused what a card refuses.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_set>

namespace {
constexpr auto CARD = c10::DeviceType::PrivateUse1;
constexpr int CARDS = 2;
thread_local c10::DeviceIndex current = 0;
std::atomic<int64_t> live[CARDS], peak[CARDS];
// Operators by name: those that let a tensor of the CPU without dimensions in, and those that the host waits for.
std::unordered_set<std::string> lenient, reading;
std::set<int> refused;         // scalar types
PyObject* listener = nullptr;  // called with (kind, operator, bytes)

// Memory
struct Allocation {
  c10::DataPtr memory;
  size_t bytes;
  int card;
};
void release(void* context) {
  auto allocation = static_cast<Allocation*>(context);
  live[allocation->card] -= allocation->bytes;
  delete allocation;
}
c10::DataPtr claim(c10::DataPtr memory, size_t bytes, int card) {
  void* at = memory.get();
  if ((live[card] += bytes) > peak[card]) peak[card] = live[card].load();
  return {at, new Allocation{std::move(memory), bytes, card}, &release, c10::Device(CARD, card)};
}
c10::DataPtr share(const c10::Storage& storage, c10::Device device) {
  return {storage.mutable_data(), new c10::Storage(storage), [](void* s) { delete static_cast<c10::Storage*>(s); },
          device};
}
struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override { return claim(c10::GetCPUAllocator()->allocate(n), n, current); }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} allocator;
std::mutex pins;
std::set<const void*> pinned;
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto memory = c10::GetCPUAllocator()->allocate(n);
    void* at = memory.get();
    {
      std::lock_guard<std::mutex> g(pins);
      pinned.insert(at);
    }
    return {at, new c10::DataPtr(std::move(memory)),
            [](void* p) {
              auto memory = static_cast<c10::DataPtr*>(p);
              {
                std::lock_guard<std::mutex> g(pins);
                pinned.erase(memory->get());
              }
              delete memory;
            },
            c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} pinned_allocator;

// Generators: the CPU's, under the card's name
struct CardGenerator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit CardGenerator(int card, at::Generator g = at::detail::createCPUGenerator())
      : c10::GeneratorImpl(c10::Device(CARD, card), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(std::move(g)) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t o) override { inner.set_offset(o); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new CardGenerator(device_.index(), inner.clone()); }
};
at::Generator& default_generator(int card) {
  static at::Generator all[CARDS] = {at::make_generator<CardGenerator>(0), at::make_generator<CardGenerator>(1)};
  return all[card < 0 ? current : card];
}

// What torch asks a device for
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return CARDS; }
  void setCurrentDevice(c10::DeviceIndex d) const override { current = d; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    auto was = current;
    current = d;
    return was;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex d) const override { return default_generator(d); }
  at::Generator getNewGenerator(c10::DeviceIndex d) const override {
    return at::make_generator<CardGenerator>(d < 0 ? current : d);
  }
  at::Device getDeviceFromPtr(void*) const override { return {CARD, current}; }
  bool isPinnedPtr(const void* p) const override {
    std::lock_guard<std::mutex> g(pins);
    return pinned.count(p);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    int card = storage.device().index();
    auto fresh = claim(c10::GetCPUAllocator()->allocate(size), size, card);
    std::memcpy(fresh.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
} hooks;
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CARD; }
  c10::Device exchangeDevice(c10::Device d) const override {
    c10::Device was(CARD, current);
    uncheckedSetDevice(d);
    return was;
  }
  c10::Device getDevice() const override { return {CARD, current}; }
  void setDevice(c10::Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Stream getStream(c10::Device d) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream getNewStream(c10::Device d, int = 0) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return CARDS; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Operators
void report(const char* kind, const std::string& op, int64_t bytes) {
  if (!listener) return;
  pybind11::gil_scoped_acquire gil;
  pybind11::reinterpret_borrow<pybind11::function>(listener)(kind, op, bytes);
}
bool on_card(const at::Tensor& t) { return t.defined() && t.device().type() == CARD; }

struct Call {                                                   // one operator's tensors, lent to the CPU
  std::vector<std::pair<c10::Storage, c10::Storage>> storages;  // card's, CPU's
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;
  c10::Device card{c10::kCPU};

  c10::Storage lend(const c10::Storage& s) {
    for (auto& [ours, theirs] : storages)
      if (ours.unsafeGetStorageImpl() == s.unsafeGetStorageImpl()) return theirs;
    auto theirs = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), s.nbytes(),
                                                        share(s, c10::kCPU), c10::GetCPUAllocator(), true);
    storages.emplace_back(s, c10::Storage(theirs));
    return storages.back().second;
  }
  at::Tensor lend(const at::Tensor& t) {
    if (!on_card(t)) return t;
    for (auto& [ours, theirs] : tensors)
      if (ours.is_same(t)) return theirs;
    card = t.device();
    tensors.emplace_back(t, dressed(lend(t.storage()), c10::DispatchKey::CPU, t));
    return tensors.back().second;
  }
  static at::Tensor dressed(c10::Storage s, c10::DispatchKey key, const at::Tensor& like) {
    return shaped(at::detail::make_tensor<c10::TensorImpl>(std::move(s), c10::DispatchKeySet(key), like.dtype()), like);
  }
  static at::Tensor shaped(const at::Tensor& out, const at::Tensor& like) {
    auto impl = out.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.is_conj()) impl->_set_conj(true);
    if (like.is_neg()) impl->_set_neg(true);
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return out;
  }
  c10::Storage adopt(const c10::Storage& s) {
    for (auto& [ours, theirs] : storages)
      if (theirs.unsafeGetStorageImpl() == s.unsafeGetStorageImpl()) return ours;
    auto ours =
        c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), s.nbytes(),
                                              claim(share(s, c10::kCPU), s.nbytes(), card.index()), &allocator, true);
    storages.emplace_back(c10::Storage(ours), s);
    return storages.back().first;
  }
  at::Tensor adopt(const at::Tensor& t) {
    if (!t.defined() || t.device().type() != c10::kCPU) return t;
    for (auto& [ours, theirs] : tensors)
      if (theirs.is_same(t)) return ours;
    TORCH_CHECK_TYPE(!refused.count(int(t.scalar_type())), "Cannot convert a card Tensor to ", t.scalar_type(),
                     " dtype as the card doesn't support it.");
    for (auto& [ours, theirs] : tensors) {  // a view has its base's keys, also in inference mode
      if (theirs.storage().unsafeGetStorageImpl() != t.storage().unsafeGetStorageImpl()) continue;
      auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(ours.storage()),
                                                           ours.key_set(), t.dtype());
      return shaped(view, t);
    }
    return dressed(adopt(t.storage()), c10::DispatchKey::PrivateUse1, t);
  }
  void settle() {  // what the operator changed of its arguments' shapes and storages
    for (auto& [ours, theirs] : storages) {
      auto a = ours.unsafeGetStorageImpl(), b = theirs.unsafeGetStorageImpl();
      if (a->data() == b->data() && a->nbytes() == b->nbytes()) continue;
      a->set_data_ptr_noswap(claim(share(theirs, c10::kCPU), b->nbytes(), a->device().index()));
      a->set_nbytes(b->nbytes());
    }
    for (size_t i = 0; i < tensors.size(); i++) {
      auto ours = tensors[i].first, theirs = tensors[i].second;
      auto impl = ours.unsafeGetTensorImpl();
      auto storage = adopt(theirs.storage());
      if (storage.unsafeGetStorageImpl() != ours.storage().unsafeGetStorageImpl())
        impl->set_storage_keep_dtype(storage);
      if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides() ||
          ours.storage_offset() != theirs.storage_offset())
        impl->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
    }
  }
};

std::string devices(const std::vector<at::Tensor>& all) {
  std::ostringstream out;
  for (auto& t : all) out << " " << t.device() << t.sizes();
  return out.str();
}

void check(const std::string& name, const std::vector<at::Tensor>& all, const at::Tensor& self, bool lists) {
  static const std::set<std::string> products{"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"};
  static const std::set<std::string> strict{"clamp.Tensor", "clamp_.Tensor", "clamp.Tensor_out", "lerp.Tensor",
                                            "lerp_.Tensor"};
  bool is_lenient = lenient.count(name) && !strict.count(name);
  bool index = name.rfind("index.Tensor", 0) == 0 || name.rfind("_index_put_impl_", 0) == 0 ||
               name.rfind("index_put", 0) == 0 || name.rfind("_unsafe_index", 0) == 0;
  at::Tensor first;
  for (auto& t : all)
    if (on_card(t)) {
      first = t;
      break;
    }
  if (!first.defined()) return;
  for (auto& t : all) {
    if (t.device() == first.device()) continue;
    bool cpu = t.device().is_cpu();
    if (cpu && index && on_card(self) && lists &&
        (t.scalar_type() == at::kLong || t.scalar_type() == at::kInt || t.scalar_type() == at::kBool ||
         t.scalar_type() == at::kByte))
      continue;
    if (cpu && is_lenient && t.dim() == 0) continue;
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ",
                first.device(), " and ", t.device(), "! (", name, ":", devices(all), ")");
  }
  std::string plain = name.substr(0, name.find('.'));
  if (products.count(plain))
    TORCH_CHECK(first.is_floating_point() || first.is_complex(), "\"", plain, "_card\" not implemented for '",
                first.scalar_type(), "'");
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::string name = schema.name().substr(schema.name().find("::") + 2);
  if (!schema.overload_name().empty()) name += "." + schema.overload_name();
  const size_t n = schema.arguments().size(), base = stack->size() - n;
  std::vector<at::Tensor> all;
  at::Tensor self;
  Call call;
  for (size_t i = 0; i < n; i++) {
    auto& v = (*stack)[base + i];
    if (v.isTensor() && v.toTensor().defined()) {
      all.push_back(v.toTensor());
      if (!i) self = v.toTensor();
    } else if (v.isTensorList()) {
      for (const at::Tensor& t : v.toTensorVector())
        if (t.defined()) all.push_back(t);
    } else if (v.isOptionalTensorList()) {
      for (auto& t : v.toOptionalTensorVector())
        if (t && t->defined()) all.push_back(*t);
    } else if (v.isDevice()) {
      if (v.toDevice().type() == CARD) call.card = {CARD, v.toDevice().index() < 0 ? current : v.toDevice().index()};
    } else if (v.isStorage() && v.toStorage().device().type() == CARD)
      call.card = v.toStorage().device();
  }
  check(name, all, self, true);
  for (auto& t : all)
    if (on_card(t)) {
      call.card = t.device();
      break;
    }
  bool waits = reading.count(name);  // index.Tensor calls nonzero by itself
  if (name.rfind("_unsafe_index.", 0) == 0 || name.rfind("_index_put_impl_", 0) == 0 || name.rfind("index_put", 0) == 0)
    for (auto& t : all)
      waits |=
          !t.is_same(self) && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte) && on_card(t) && t.dim();
  if (waits && call.card.type() == CARD) report("read", name, 0);
  for (size_t i = 0; i < n; i++) {
    auto& v = (*stack)[base + i];
    if (v.isTensor()) {
      v = call.lend(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> l;
      for (const at::Tensor& t : v.toTensorVector()) l.push_back(call.lend(t));
      v = l;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> l;
      for (auto& t : v.toOptionalTensorVector())
        l.push_back(t ? std::optional<at::Tensor>(call.lend(*t)) : std::nullopt);
      v = l;
    } else if (v.isDevice() && v.toDevice().type() == CARD)
      v = c10::Device(c10::kCPU);
    else if (v.isStorage() && v.toStorage().device().type() == CARD)
      v = call.lend(v.toStorage());
    else if (v.isGenerator()) {
      auto g = v.toGenerator();
      TORCH_CHECK(g.device().type() == CARD, "Expected a 'card' device type for generator but found '",
                  g.device().type(), "' (", name, ")");
      v = static_cast<CardGenerator*>(g.unsafeGetGeneratorImpl())->inner;
    } else if (v.isNone() && call.card.type() == CARD && schema.arguments()[i].type()->str().find("Generator") == 0)
      v = static_cast<CardGenerator*>(default_generator(call.card.index()).unsafeGetGeneratorImpl())->inner;
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.settle();
  const size_t m = schema.returns().size(), from = stack->size() - m;
  for (size_t i = 0; i < m; i++) {
    auto& v = (*stack)[from + i];
    if (v.isTensor())
      v = call.adopt(v.toTensor());
    else if (v.isTensorList()) {
      c10::List<at::Tensor> l;
      for (const at::Tensor& t : v.toTensorVector()) l.push_back(call.adopt(t));
      v = l;
    }
  }
}
void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { run(op, stack); }

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  int64_t bytes = self.numel() * self.element_size();
  TORCH_CHECK_TYPE(!on_card(dst) || !refused.count(int(dst.scalar_type())), "Cannot convert a card Tensor to ",
                   dst.scalar_type(), " dtype as the card doesn't support it.");
  if (on_card(self) && !on_card(dst)) report(non_blocking ? "read later" : "read", "copy to host", bytes);
  if (!on_card(self) && on_card(dst))
    report(non_blocking ? "upload later" : "upload", self.is_pinned() ? "copy of pinned" : "copy", bytes);
  if (on_card(self) && on_card(dst) && self.device() != dst.device()) report("between cards", "copy", bytes);
  Call call;
  at::AutoDispatchBelowADInplaceOrView below;
  call.lend(dst).copy_(call.lend(self));
  return dst;
}
bool compatible(const at::Tensor& self, const at::Tensor& from) {
  auto dense = [](const at::Tensor& t) {
    return t.key_set().has_any(
               c10::DispatchKeySet({c10::BackendComponent::CPUBit, c10::BackendComponent::PrivateUse1Bit})) &&
           t.key_set().has(c10::DispatchKey::Dense);
  };
  return self.key_set() == from.key_set() || (dense(self) && dense(from));
}
bool pinned_here(const at::Tensor& self, std::optional<c10::Device>) {
  return hooks.isPinnedPtr(self.storage().data());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_has_compatible_shallow_copy_type", &compatible);
  // What torch makes of other operators where a device has no kernel; CUDA has one, and so has the CPU.
  for (auto name : {"convolution", "convolution_backward", "native_layer_norm", "native_group_norm"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at;
  using namespace at::autocast;
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(FULL)
  AT_FORALL_PROMOTE(WIDEST)
#define SET(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
  AT_FORALL_FP32_SET_OPT_DTYPE(SET)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(CARD, &allocator);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("rules", [](std::vector<std::string> a, std::vector<std::string> b) {
    lenient = {a.begin(), a.end()};
    reading = {b.begin(), b.end()};
  });
  m.def("listen", [](pybind11::object f) {
    Py_XDECREF(listener);
    listener = f.is_none() ? nullptr : f.release().ptr();
  });
  m.def("refuse", [](std::vector<pybind11::object> types) {
    refused.clear();
    for (auto& t : types) refused.insert(int(reinterpret_cast<THPDtype*>(t.ptr())->scalar_type));
  });
  m.def("live", [](int card) { return live[card].load(); });
  m.def("peak", [](int card) { return peak[card].load(); });
  m.def("reset_peak", [](int card) { peak[card] = live[card].load(); });
  m.def("current", [] { return int(current); });
  m.def("set_current", [](int card) { current = card; });
  m.def("default_generator", [](int card) { return default_generator(card); });
}
