// A step that libtorch runs on CPU tensors without data, and a log of what it allocates.
//
// Three things are put in place. The allocator of the CPU gives out addresses in place of memory, save for what is
// small, and writes down what it gives and takes back. A kernel under the dispatch key `Fake`, which lies between
// autograd and the devices and which nothing else uses, stands in for every kernel of the CPU: it asks the operator's
// meta kernel for the shapes of the results and makes these, and nothing is computed. All that is above stays as it is:
// autograd, autocast, checkpoints, composite operators, the choice of a kernel of attention. A RecordFunction callback
// sees each operator and each node of the graph begin and end.
//
// Values that are known are computed all the same: whole numbers, masks and single numbers that come of nothing but
// such (token ids, positions, the optimizer's count of steps).
//
// The device may be CUDA, whether or not there is a card or this PyTorch is built for one: then tensors of that device
// are given out too, by an allocator of their own, whose rows alone are written; what the dispatcher needs of a device is
// put in place while the step runs. What a program keeps on the CPU then is the host's.
//
// All of them write rows of one log, in order of time; what the rows mean is decided in Python (log.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#ifndef NDEBUG
#error torch is built with NDEBUG, which decides the layout of its classes
#endif

namespace py = pybind11;
using c10::DispatchKey;
using c10::DispatchKeySet;

namespace {

enum Kind : int64_t { ALLOCATED = 0, FREED = 1, BEGUN = 2, ENDED = 3, MARKED = 4 };

struct Row {
  int64_t kind, a, b, c, d, e;
};

struct Log {
  bool on = false;        // rows are written
  bool observes = false;  // of operators too, not only of storages
  bool aside = false;     // a meta kernel is asked for shapes: what happens meanwhile is not the step's
  bool cuda = false;      // the step's device is CUDA, not the CPU
  std::vector<Row> rows;
  std::vector<int64_t> operands;  // of operators, see `write`
  std::vector<std::string> names;
  std::unordered_map<std::string, int64_t> name_index;
  std::vector<std::pair<std::string, int64_t>> lines;  // (file, line)
  std::unordered_map<std::string, int64_t> line_index;
  std::unordered_set<std::string> kernels;  // operators that compute, on the device
  std::unordered_set<std::string> dependent;  // those of them whose results' shapes depend on values
  py::object* choose = nullptr;             // asked for attention's kernel on CUDA
  py::object* assume = nullptr;             // asked for a value that is not known: (operator, dtype) to a number
  std::vector<std::string> libraries;       // folders whose code is not the user's
  std::unordered_map<PyCodeObject*, bool> is_library;
  int64_t next = 1;  // number of the next storage
  int64_t depth = 0, kernel = 0;  // operators that are running, and at which depth one of them is a kernel
  size_t kernel_row = 0;          // the row of that one
};

Log& log_() {
  static Log log;
  return log;
}

// ---- storages

constexpr size_t REAL = size_t{4} << 20;      // bytes from which on there is no memory behind a storage
constexpr size_t REGION = size_t{64} << 40;   // addresses that such storages have
constexpr int64_t FEW = 256;                   // real numbers that are worth computing
constexpr int64_t MANY = int64_t{1} << 17;     // the same of plain ones: an optimizer's zeros would be memory otherwise

struct Held {
  c10::DataPtr inner;
  int64_t id;  // 0: the host's, while the device is another
  bool known;  // its values are those that it would have
  bool plain = false;  // and come of nothing but whole numbers and constants: they are worth computing
  std::string made;  // the operator that was left out and would have made them
};

void free_held(void* context) {
  auto* held = static_cast<Held*>(context);
  if (log_().on && held->id) log_().rows.push_back({FREED, held->id, 0, 0, 0, 0});
  delete held;
}

void keep(void*) {}

char* region_ = nullptr;  // of both devices
size_t given_ = 0;

struct Allocator final : c10::Allocator {
  c10::Device device;
  c10::Allocator* inner = nullptr;

  explicit Allocator(c10::Device device) : device(device) {}

  c10::DataPtr allocate(size_t nbytes) override {
    auto& log = log_();
    if (device.is_cpu() && (!log.on || log.aside || !nbytes)) return inner->allocate(nbytes);
    if (!nbytes) return {nullptr, device};
    const bool real = nbytes <= REAL, counted = log.on && !log.aside && device.is_cuda() == log.cuda;
    auto* held = new Held{real ? inner->allocate(nbytes) : address(nbytes), counted ? log.next++ : 0, real, ""};
    if (counted) log.rows.push_back({ALLOCATED, held->id, static_cast<int64_t>(nbytes), 0, 0, 0});
    return {held->inner.get(), held, &free_held, device};
  }

  c10::DataPtr address(size_t nbytes) {
    TORCH_CHECK(nbytes <= REGION, "a tensor of ", nbytes, " bytes");
    if (region_ == nullptr) {
      void* found = mmap(nullptr, REGION, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      TORCH_CHECK(found != MAP_FAILED, "the system gives out no addresses without memory");
      region_ = static_cast<char*>(found);
    }
    if (given_ + nbytes > REGION) given_ = 0;
    char* at = region_ + given_;
    given_ += (nbytes + 4095) / 4096 * 4096;
    return {at, at, &keep, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, std::size_t n) const override {
    if (n <= REAL) default_copy_data(to, from, n);
  }
};

Allocator allocator_{c10::Device(c10::DeviceType::CPU)};
Allocator cuda_{c10::Device(c10::DeviceType::CUDA, 0)};

at::Tensor empty_on_cuda(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, &cuda_, DispatchKeySet(DispatchKey::CUDA), dtype);
}

Held* held_of(const at::Tensor& t) {
  if (!t.defined() || !t.has_storage()) return nullptr;
  const auto& data = t.storage().unsafeGetStorageImpl()->data_ptr();
  return data.get_deleter() == &free_held ? static_cast<Held*>(data.get_context()) : nullptr;
}

// `UntypedStorage.resize_` of CUDA, which PyTorch's library for CUDA has: other memory, with the same values in it.
void resize(c10::StorageImpl& storage, size_t nbytes) {
  const size_t kept = std::min(nbytes, storage.nbytes());
  c10::DataPtr to = cuda_.allocate(nbytes);
  if (kept && nbytes <= REAL && storage.nbytes() <= REAL) std::memcpy(to.mutable_get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(to));
  storage.set_nbytes(nbytes);
}

int64_t number_of(const c10::StorageImpl& storage) {
  const auto& data = storage.data_ptr();
  return data.get_deleter() == &free_held ? static_cast<Held*>(data.get_context())->id : 0;
}

// ---- kernels that compute nothing

bool is_known(const at::Tensor& t) {
  const auto* held = held_of(t);
  if (held != nullptr && !held->known) return false;
  if (!at::isFloatingType(t.scalar_type()) && !at::isComplexType(t.scalar_type())) return true;
  return t.numel() <= FEW || (held != nullptr && held->plain && t.numel() <= MANY);
}

template <class F>
void each_tensor(const c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) f(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorList())
      if (t.defined()) f(t);
  } else if (value.isList()) {
    for (const c10::IValue& x : value.toListRef()) each_tensor(x, f);
  }
}

bool is_a_device(const c10::IValue& value, c10::DeviceType type) {
  return value.isDevice() && value.toDevice().type() == type;
}

struct Shapes {  // the meta tensors that stand for an operator's arguments
  std::string made;  // the operator
  bool cuda = false;  // it runs there
  bool copies = false;  // from one device to the other, numbers too
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;

  bool stands_for(const at::Tensor& t) const {
    if (!t.defined() || t.unsafeGetTensorImpl()->is_wrapped_number()) return false;
    return t.is_cuda() || (t.is_cpu() && !(cuda && !copies && !t.dim()));  // or else a number of the host's
  }

  at::Tensor meta_of(const at::Tensor& t) {
    if (!stands_for(t)) return t;
    for (const auto& [own, meta] : pairs)
      if (own.is_same(t)) return meta;
    at::Tensor meta = at::detail::empty_strided_meta(t.sizes(), t.strides(), t.scalar_type());
    pairs.emplace_back(t, meta);
    return meta;
  }

  c10::IValue meta_of(const c10::IValue& value) {
    if (value.isTensor()) return meta_of(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(meta_of(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        list.push_back(t.has_value() ? std::optional<at::Tensor>(meta_of(*t)) : std::nullopt);
      return list;
    }
    if (is_a_device(value, cuda ? c10::DeviceType::CUDA : c10::DeviceType::CPU)) return c10::Device(c10::DeviceType::Meta);
    return value;
  }

  at::Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) const {
    return cuda ? empty_on_cuda(sizes, strides, dtype) : at::Tensor(at::detail::empty_strided_cpu(sizes, strides, dtype));
  }

};

// What a meta kernel has said of one result: all that is needed to make it.
struct Result {
  enum { UNDEFINED, NEW, ARGUMENT, HOST, LIST, VALUE } kind = UNDEFINED;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype = at::kFloat;
  int64_t elements = 0;  // of its storage
  size_t argument = 0;   // among the tensors that the operator was given
  std::vector<Result> list;
  c10::IValue value;

  static Result of(const at::Tensor& t, const Shapes& shapes) {
    Result found;
    if (!t.defined()) return found;
    found.sizes = t.sizes().vec(), found.strides = t.strides().vec(), found.dtype = t.scalar_type();
    found.elements = static_cast<int64_t>(t.storage().nbytes() / t.itemsize());
    found.kind = t.is_meta() ? NEW : HOST;
    for (size_t i = 0; i < shapes.pairs.size(); ++i)
      if (shapes.pairs[i].second.is_same(t)) found.kind = ARGUMENT, found.argument = i;
    return found;
  }

  static Result of(const c10::IValue& value, const Shapes& shapes) {
    if (value.isTensor()) return of(value.toTensor(), shapes);
    Result found;
    found.kind = value.isTensorList() ? LIST : VALUE;
    if (found.kind == VALUE) found.value = value;
    if (found.kind == LIST)
      for (const at::Tensor& t : value.toTensorList()) found.list.push_back(of(t, shapes));
    return found;
  }

  size_t bytes() const {
    size_t most = kind == NEW || kind == ARGUMENT ? c10::multiply_integers(sizes) * c10::elementSize(dtype) : 0;
    for (const auto& one : list) most = std::max(most, one.bytes());
    return most;
  }

  // Whether a result of another device's kernel is the same but for its values.
  bool is_like(const c10::IValue& other) const {
    if (kind == UNDEFINED || kind == VALUE || kind == LIST || !other.isTensor()) return true;
    const auto& t = other.toTensor();
    return t.defined() && t.scalar_type() == dtype && t.sizes() == sizes;
  }

  // The argument that it is, or a new tensor on the operator's device; `given` are the operator's tensors.
  at::Tensor tensor(const std::vector<at::Tensor>& given, const Shapes& shapes) const {
    if (kind == UNDEFINED) return {};
    if (kind == ARGUMENT) {
      const auto& own = given[argument];
      if (own.sizes() != sizes) own.resize_(sizes);
      return own;
    }
    if (kind == HOST) {
      log_().aside = true;
      at::Tensor made = at::detail::empty_strided_cpu(sizes, strides, dtype);
      log_().aside = false;
      return made;
    }
    at::Tensor made;
    if (sizes.empty() && elements > 1) {  // one number in the storage of what it was made of
      made = shapes.empty({elements}, {1}, dtype);
      made.unsafeGetTensorImpl()->set_sizes_contiguous({});
    } else {
      made = shapes.empty(sizes, strides, dtype);
    }
    if (auto* held = held_of(made)) {
      held->known = false;
      held->made = shapes.made;
    }
    return made;
  }

  c10::IValue own(const std::vector<at::Tensor>& given, const Shapes& shapes) const {
    if (kind == VALUE) return value;
    if (kind != LIST) return tensor(given, shapes);
    c10::List<at::Tensor> made;
    for (const auto& one : list) made.push_back(one.tensor(given, shapes));
    return made;
  }
};

// The same operator on the same shapes has the same results: a meta kernel, often of Python, is asked once.
std::unordered_map<std::string, std::vector<Result>> asked_;

struct Question {
  std::string key;
  std::vector<at::Tensor> given;  // tensors that a meta tensor stands for, each once
  bool plain = true;              // of nothing but tensors and numbers

  void add(int64_t x) { key.append(reinterpret_cast<const char*>(&x), sizeof x); }

  void add(const at::Tensor& t, const Shapes& shapes) {
    if (!t.defined()) return add(-1);
    size_t i = 0;
    if (shapes.stands_for(t)) {
      while (i < given.size() && !given[i].is_same(t)) ++i;
      if (i == given.size()) given.push_back(t);
      add(static_cast<int64_t>(i));
    } else {
      add(-2 - t.unsafeGetTensorImpl()->is_wrapped_number());
    }
    add(static_cast<int64_t>(t.scalar_type()));
    add(t.dim());
    for (auto n : t.sizes()) add(n);
    for (auto n : t.strides()) add(n);
  }

  void add(const c10::IValue& value, const Shapes& shapes) {
    add(static_cast<int64_t>(value.tagKind().size()) << 32 | value.tagKind()[0]);
    if (value.isTensor()) return add(value.toTensor(), shapes);
    if (value.isNone()) return;
    if (value.isBool()) return add(value.toBool());
    if (value.isInt()) return add(value.toInt());
    if (value.isDouble()) {
      const double x = value.toDouble();
      int64_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      return add(bits);
    }
    if (value.isDevice()) return add(static_cast<int64_t>(value.toDevice().type()));
    if (value.isList()) {
      const auto list = value.toListRef();
      add(static_cast<int64_t>(list.size()));
      for (const auto& x : list) add(x, shapes);
      return;
    }
    plain = false;
  }
};

bool writes(const c10::FunctionSchema& schema) {
  for (const auto& argument : schema.arguments())
    if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) return true;
  return false;
}

std::string name_of(const c10::OperatorHandle& op) {
  const auto& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// Operators whose first argument is written whole, whatever it was.
const std::unordered_set<std::string> OVERWRITE = {"aten::zero_", "aten::fill_.Scalar", "aten::copy_", "aten::arange.start_out"};

// Whether what an operator makes of known values comes of nothing but whole numbers and constants.
bool is_plain(const std::string& name, const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments) {
  for (const auto& argument : schema.arguments())
    if (argument.name() == "generator") return false;
  bool plain = true;
  for (size_t i = OVERWRITE.count(name); i < arguments.size(); ++i)
    each_tensor(arguments[i], [&](const at::Tensor& t) {
      const auto* held = held_of(t);
      plain &= !at::isFloatingType(t.scalar_type()) || t.unsafeGetTensorImpl()->is_wrapped_number() ||
               (held != nullptr && held->plain);
    });
  return plain;
}

// What the meta kernel says of the results.
std::vector<Result> ask(const c10::OperatorHandle& op, Shapes& shapes, at::ArrayRef<c10::IValue> arguments) {
  auto& log = log_();
  std::vector<c10::IValue> values;
  for (const auto& value : arguments) values.push_back(shapes.meta_of(value));
  log.aside = true;
  try {
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard without(DispatchKey::Fake);
    op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &values);
  } catch (...) {
    log.aside = false;
    throw;
  }
  log.aside = false;
  std::vector<Result> found;
  for (const auto& value : values) found.push_back(Result::of(value, shapes));
  return found;
}

// The numbers that `topk` chooses in each row of x are not known: they are dealt out one after the other, so that no row
// has one twice and all are chosen as often. What follows from them (an expert's rows, their count) is then known.
void deal_out(const at::Tensor& x, const at::Tensor& chosen, int64_t dim) {
  auto* held = held_of(chosen);
  const int64_t last = x.dim() - 1, among = x.dim() ? x.size(last) : 1;
  if (held == nullptr || chosen.nbytes() > REAL || !chosen.is_contiguous() || (dim != -1 && dim != last) || !chosen.numel()) return;
  auto* to = chosen.data_ptr<int64_t>();
  for (int64_t i = 0; i < chosen.numel(); ++i) to[i] = i % among;
  held->known = true;
  if (log_().assume == nullptr) return;
  py::gil_scoped_acquire gil;
  (*log_().assume)(held->made, "Dealt");
}

// An operator of CUDA's whose values are known is computed on the host, on the memory that is behind them.
struct OnHost {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;

  at::Tensor host_of(const at::Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    for (const auto& [own, host] : pairs)
      if (own.is_same(t)) return host;
    const auto options = at::TensorOptions().dtype(t.scalar_type()).device(at::kCPU);
    at::Tensor host = t.numel() ? at::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), options)
                                : at::Tensor(at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type()));
    pairs.emplace_back(t, host);
    return host;
  }

  c10::IValue host_of(const c10::IValue& value) {
    if (value.isTensor()) return host_of(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(host_of(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        list.push_back(t.has_value() ? std::optional<at::Tensor>(host_of(*t)) : std::nullopt);
      return list;
    }
    if (is_a_device(value, c10::DeviceType::CUDA)) return c10::Device(c10::DeviceType::CPU);
    return value;
  }

  at::Tensor own_of(const at::Tensor& result) {
    if (!result.defined()) return result;
    for (const auto& [own, host] : pairs)
      if (host.is_same(result)) {
        if (own.sizes() == result.sizes()) return own;
        own.resize_(result.sizes());  // what it is written to had no elements yet
        return filled(own, result);
      }
    return filled(empty_on_cuda(result.sizes(), result.strides(), result.scalar_type()), result);
  }

  static at::Tensor filled(at::Tensor own, const at::Tensor& host) {
    if (host.numel()) std::memcpy(own.mutable_data_ptr(), host.const_data_ptr(), std::min(own.nbytes(), host.nbytes()));
    return own;
  }

  c10::IValue own_of(const c10::IValue& value) {
    if (value.isTensor()) return own_of(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(own_of(t));
      return list;
    }
    return value;
  }

  // Whether the CPU has such a kernel, too, with results like those that are expected, if any are.
  bool run(const c10::OperatorHandle& op, torch::jit::Stack* stack, const std::vector<Result>* expected) {
    auto& log = log_();
    const size_t count = op.schema().arguments().size(), returns = op.schema().returns().size();
    torch::jit::Stack values;
    for (const auto& value : torch::jit::last(*stack, count)) values.push_back(host_of(value));
    log.aside = true;
    try {
      at::AutoDispatchBelowADInplaceOrView guard;
      op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &values);
    } catch (const std::exception&) {
      log.aside = false;
      return false;
    }
    log.aside = false;
    for (size_t i = 0; expected != nullptr && i < returns; ++i)
      if (!(*expected)[i].is_like(values[i])) return false;
    torch::jit::drop(*stack, count);
    for (size_t i = 0; i < returns; ++i) torch::jit::push(*stack, own_of(values[i]));
    return true;
  }
};

void left_out(const c10::OperatorHandle& op, DispatchKeySet below, torch::jit::Stack* stack) {
  auto& log = log_();
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), returns = schema.returns().size();
  const auto arguments = torch::jit::last(*stack, count);
  bool known = true, ours = true, cuda = false;
  for (const auto& value : arguments) {
    cuda |= is_a_device(value, c10::DeviceType::CUDA);
    each_tensor(value, [&](const at::Tensor& t) {
      known &= is_known(t);
      ours &= t.is_cpu() || (log.cuda && t.is_cuda());
      cuda |= t.is_cuda();
    });
  }
  const auto compute = [&](const std::vector<Result>* expected = nullptr) {
    const bool plain = is_plain(name_of(op), schema, arguments);
    if (cuda && !OnHost().run(op, stack, expected)) return false;
    if (!cuda) op.redispatchBoxed(below, stack);
    for (const auto& value : torch::jit::last(*stack, returns))
      each_tensor(value, [&](const at::Tensor& t) {
        if (auto* held = held_of(t)) held->plain = plain;
      });
    return true;
  };
  if (!ours) {
    op.redispatchBoxed(below, stack);
    return;
  }
  if (known && (writes(schema) || log.dependent.count(name_of(op))) && compute()) return;
  const auto name = name_of(op);
  if (!known && name == "aten::_local_scalar_dense" && log.assume != nullptr) {
    const auto t = arguments[0].toTensor();
    const auto* held = held_of(t);
    const auto kind = std::string(c10::toString(t.scalar_type()));
    double assumed;
    {
      py::gil_scoped_acquire gil;
      assumed = (*log.assume)(held == nullptr ? "" : held->made, kind).cast<double>();
    }
    torch::jit::drop(*stack, count);
    if (t.scalar_type() == at::kBool)
      torch::jit::push(*stack, c10::IValue(c10::Scalar(assumed != 0)));
    else if (at::isIntegralType(t.scalar_type(), false))
      torch::jit::push(*stack, c10::IValue(c10::Scalar(static_cast<int64_t>(assumed))));
    else
      torch::jit::push(*stack, c10::IValue(c10::Scalar(assumed)));
    return;
  }
  Shapes shapes;
  shapes.made = name;
  shapes.cuda = cuda;
  shapes.copies = name == "aten::copy_";
  shapes.made += ":";
  if (count && arguments[0].isTensor()) shapes.made += std::to_string(arguments[0].toTensor().numel());
  Question question;
  question.key = name + (cuda ? "@cuda" : "");
  for (const auto& value : arguments) question.add(value, shapes);
  auto found = question.plain ? asked_.find(question.key) : asked_.end();
  std::vector<Result> fresh;
  if (found == asked_.end()) {
    try {
      fresh = ask(op, shapes, arguments);
    } catch (...) {
      if (!known || !compute()) throw;  // its results depend on values, which there are
      return;
    }
    if (question.plain) found = asked_.emplace(question.key, fresh).first;
  }
  const auto& results = question.plain ? found->second : fresh;
  size_t most = 0;
  for (const auto& result : results) most = std::max(most, result.bytes());
  if (known && most <= REAL && compute(&results)) return;
  if (log.kernel && cuda == log.cuda) log.rows[log.kernel_row].c = 3;
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    const auto* source = shapes.copies ? held_of(arguments[1].toTensor()) : nullptr;  // whose values they are
    each_tensor(arguments[i], [&](const at::Tensor& t) {
      auto* held = held_of(t);
      if (held == nullptr || held == source) return;
      held->known = false;
      held->made = source != nullptr && !source->known ? source->made : shapes.made;
    });
  }
  std::vector<c10::IValue> made;
  for (const auto& result : results) made.push_back(result.own(question.given, shapes));
  if (!known && name == "aten::topk") deal_out(arguments[0].toTensor(), made[1].toTensor(), arguments[2].toInt());
  torch::jit::drop(*stack, count);
  for (size_t i = 0; i < returns; ++i) torch::jit::push(*stack, std::move(made[i]));
}

void kernel(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
  auto& log = log_();
  const auto below = keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::Fake);
  if (!log.on || log.aside || !log.kernels.count(name_of(op)))
    op.redispatchBoxed(below, stack);
  else
    left_out(op, below, stack);
}

// ---- CUDA, as the dispatcher sees it

// What PyTorch has no kernel for here: one that computes is left out; what makes a view or gives a storage another size
// is the same code on all devices.
void on_cuda(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  if (log_().kernels.count(name_of(op)))
    left_out(op, DispatchKeySet(DispatchKey::CPU), stack);
  else
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
}

at::Tensor empty(
    at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &cuda_, DispatchKeySet(DispatchKey::CUDA), at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return empty_on_cuda(sizes, strides, at::dtype_or_default(dtype));
}

// Which kernel attention takes there: of the shapes of queries, keys and values, their bytes an element, whether there is
// a mask, and whether keys have fewer heads.
int64_t attention_kernel(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask, double,
    bool causal, std::optional<double>, bool grouped) {
  py::gil_scoped_acquire gil;
  const bool masked = mask.has_value() && mask->defined();
  return (*log_().choose)(q.sizes().vec(), k.sizes().vec(), v.sizes().vec(), q.itemsize(), masked, causal, grouped).cast<int64_t>();
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return cuda_.device; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, cuda_.device); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(cuda_.device); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

// What the rest of PyTorch asks CUDA's library: one device, whose kernels are never launched.
struct Hooks final : at::CUDAHooksInterface {
  Hooks() : at::CUDAHooksInterface() {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));

// In place while a step of CUDA's is recorded; what was there before is there again afterwards.
struct Cuda {
  torch::Library every{torch::Library::IMPL, "_", DispatchKey::CUDA, __FILE__, __LINE__};
  torch::Library aten{torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__};
  const c10::impl::DeviceGuardImplInterface* before;
  void* hooks_before;
  void* attention_before;

  static std::atomic<const c10::impl::DeviceGuardImplInterface*>& guard() {
    return c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  }

  // PyTorch makes its one object of hooks when it is first asked for, and keeps it for good: it is given the functions of
  // `Hooks`, which has no data of its own, and its own ones back afterwards.
  static void*& functions(const at::CUDAHooksInterface& hooks) {
    return *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&hooks));
  }

  // The stub that chooses attention's kernel has nothing but its pointers, of which CUDA's can be set and not read.
  static void*& attention() {
    auto& stub = at::native::_fused_sdp_choice_stub;
    static_assert(sizeof stub == sizeof(at::native::DispatchStubImpl));
    return reinterpret_cast<at::native::DispatchStubImpl*>(&stub)->cuda_dispatch_ptr;
  }

  explicit Cuda(const std::vector<std::string>& composite) : before(guard().load()), hooks_before(functions(at::detail::getCUDAHooks())) {
    every.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cuda>());
    aten.impl("empty.memory_format", &empty);
    aten.impl("empty_strided", &empty_strided);
    for (const auto& name : composite)
      aten.impl(name.c_str() + 6, torch::CppFunction::makeFromBoxedFunction<&on_cuda>());  // without "aten::"
    guard().store(new Guard());  // its destructor is deleted: it stays
    static const Hooks hooks;
    functions(at::detail::getCUDAHooks()) = functions(hooks);
    attention_before = attention();
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_kernel);
  }

  ~Cuda() {
    guard().store(before);
    functions(at::detail::getCUDAHooks()) = hooks_before;
    attention() = attention_before;
  }
};

std::unique_ptr<Cuda> on_cuda_;

TORCH_LIBRARY_IMPL(_, Fake, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }

// ---- operators, as they are seen

// An operand: 0 nothing; 1 a tensor: storage, dtype, wrapped number, known, dimensions, sizes, strides; 2 a whole
// number; 3 a real one, its bits; 4 whole numbers, how many first; 5 tensors, how many first; 6 anything else.
void write(std::vector<int64_t>& to, const at::Tensor& t) {
  if (!t.defined() || !t.has_storage()) {
    to.push_back(0);
    return;
  }
  const auto sizes = t.sizes(), strides = t.strides();
  to.insert(to.end(), {1, number_of(*t.storage().unsafeGetStorageImpl()), static_cast<int64_t>(t.scalar_type()),
                       t.unsafeGetTensorImpl()->is_wrapped_number(), is_known(t), static_cast<int64_t>(sizes.size())});
  to.insert(to.end(), sizes.begin(), sizes.end());
  to.insert(to.end(), strides.begin(), strides.end());
}

void write(std::vector<int64_t>& to, const c10::IValue& value) {
  if (value.isTensor()) {
    write(to, value.toTensor());
  } else if (value.isNone()) {
    to.push_back(0);
  } else if (value.isBool()) {
    to.insert(to.end(), {2, value.toBool()});
  } else if (value.isInt()) {
    to.insert(to.end(), {2, value.toInt()});
  } else if (value.isDouble()) {
    const double x = value.toDouble();
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to.insert(to.end(), {3, bits});
  } else if (value.isIntList()) {
    const auto list = value.toIntVector();
    to.insert(to.end(), {4, static_cast<int64_t>(list.size())});
    to.insert(to.end(), list.begin(), list.end());
  } else if (value.isBoolList()) {
    const auto list = value.toBoolList();
    to.insert(to.end(), {4, static_cast<int64_t>(list.size())});
    for (bool x : list) to.push_back(x);
  } else if (value.isTensorList()) {
    const auto list = value.toTensorVector();
    to.insert(to.end(), {5, static_cast<int64_t>(list.size())});
    for (const auto& t : list) write(to, t);
  } else if (value.isList()) {  // of tensors that may be missing
    const auto list = value.toListRef();
    to.insert(to.end(), {5, static_cast<int64_t>(list.size())});
    for (const auto& x : list) write(to, x);
  } else {
    to.push_back(6);
  }
}

bool in_library(PyCodeObject* code) {
  auto& log = log_();
  auto known = log.is_library.find(code);
  if (known != log.is_library.end()) return known->second;
  Py_INCREF(code);  // its address stays its own
  const char* file = PyUnicode_AsUTF8(code->co_filename);
  bool found = file == nullptr || file[0] == '<';
  for (const auto& folder : log.libraries) found |= file != nullptr && !std::strncmp(file, folder.c_str(), folder.size());
  log.is_library[code] = found;
  return found;
}

// The line of source that is running: of the innermost frame of Python that is not a library's; -1 if there is none.
int64_t line() {
  auto& log = log_();
  py::gil_scoped_acquire gil;
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  int64_t found = -1;
  while (frame != nullptr) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    if (!in_library(code)) {
      const std::string file = PyUnicode_AsUTF8(code->co_filename);
      const int64_t number = PyFrame_GetLineNumber(frame);
      const auto made = log.line_index.emplace(file + ":" + std::to_string(number), log.lines.size());
      if (made.second) log.lines.emplace_back(file, number);
      found = made.first->second;
    }
    Py_DECREF(code);
    PyFrameObject* back = found < 0 ? PyFrame_GetBack(frame) : nullptr;
    Py_DECREF(frame);
    frame = back;
  }
  return found;
}

struct Seen : at::ObserverContext {};

std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction& f) {
  auto& log = log_();
  if (!log.on || !log.observes || log.aside) return nullptr;
  std::string name = f.name();
  const auto op = f.operator_name();
  if (op && !op->overload_name.empty()) name += "." + op->overload_name;
  const auto made = log.name_index.emplace(name, log.names.size());
  if (made.second) log.names.push_back(name);
  ++log.depth;
  int64_t operands = -1;
  const bool node = f.scope() == at::RecordScope::BACKWARD_FUNCTION;
  bool kernel = op && !log.kernel && log.kernels.count(name);
  if (kernel) {
    bool any = false, cuda = false, wrapped = false;
    for (const auto& x : f.inputs())
      each_tensor(x, [&](const at::Tensor& t) {
        any = true;
        cuda |= t.is_cuda();
        wrapped |= t.key_set().has(DispatchKey::Python);  // a DTensor, whose kernels are those that it asks for within
      });
    kernel = !wrapped && (!log.cuda || cuda || !any);
  }
  if (kernel) {
    log.kernel = log.depth;
    log.kernel_row = log.rows.size();
    operands = static_cast<int64_t>(log.operands.size());
    const auto inputs = f.inputs();
    log.operands.push_back(static_cast<int64_t>(inputs.size()));
    for (const auto& x : inputs) write(log.operands, x);
  }
  const int64_t at = log.kernel && !kernel ? -1 : line();
  log.rows.push_back({BEGUN, made.first->second, f.seqNr(), node ? 2 : kernel ? 1 : 0, operands, at});
  return std::make_unique<Seen>();
}

void end(const at::RecordFunction& f, at::ObserverContext* seen) {
  auto& log = log_();
  if (!log.on || !log.observes || seen == nullptr) return;
  int64_t operands = -1;
  if (log.kernel && log.kernel == log.depth) {
    operands = static_cast<int64_t>(log.operands.size());
    const auto outputs = f.outputs();
    log.operands.push_back(static_cast<int64_t>(outputs.size()));
    for (const auto& x : outputs) write(log.operands, x);
    log.kernel = 0;
  }
  --log.depth;
  log.rows.push_back({ENDED, 0, 0, 0, operands, 0});
}

// ---- from Python

void start() {
  auto& log = log_();
  log.rows.clear();
  log.operands.clear();
  log.depth = log.kernel = 0;
  log.observes = log.aside = false;
  log.on = true;
}

at::CallbackHandle handle_ = 0;

// `composite`: operators that are written in terms of others for devices which have no kernel of them, as CUDA has.
void install(bool cuda, const std::vector<std::string>& composite) {
  allocator_.inner = cuda_.inner = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, &allocator_, 255);
  log_().cuda = cuda;
  asked_.clear();
  if (cuda) on_cuda_ = std::make_unique<Cuda>(composite);
  c10::impl::tls_set_dispatch_key_included(DispatchKey::Fake, true);
  handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&begin, &end)
                                           .needsInputs(true)
                                           .needsOutputs(true)
                                           .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
}

void uninstall() {
  log_().on = false;
  at::removeCallback(handle_);
  c10::impl::tls_set_dispatch_key_included(DispatchKey::Fake, false);
  c10::SetAllocator(c10::DeviceType::CPU, allocator_.inner, 255);
  on_cuda_.reset();
}

template <class T>
py::bytes as_bytes(const std::vector<T>& values) {
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install, "Put the allocators, the kernels and the observer in place; for CUDA or for the CPU.");
  m.def("uninstall", &uninstall, "Take them away.");
  m.def("start", &start, "Begin an empty log.");
  m.def("observe", [](bool observes) { log_().observes = observes; }, "Write rows of operators, or of storages only.");
  m.def("mark", [](int64_t what, int64_t value, int64_t more) {
    auto& log = log_();
    if (log.on) log.rows.push_back({MARKED, what, value, more, 0, 0});
  });
  m.def("number_of", [](int64_t cdata) { return number_of(*reinterpret_cast<c10::StorageImpl*>(cdata)); },
        "The number of a storage, from its `_cdata`; 0 of one that was made before `install`.");
  m.def("resize", [](int64_t cdata, size_t nbytes) { resize(*reinterpret_cast<c10::StorageImpl*>(cdata), nbytes); },
        "Give a storage of CUDA's so many bytes.");
  m.def("forget", [](int64_t cdata, const std::string& made) {
    const auto& data = reinterpret_cast<c10::StorageImpl*>(cdata)->data_ptr();
    if (data.get_deleter() != &free_held) return;
    auto* held = static_cast<Held*>(data.get_context());
    if (held->known) held->known = false, held->made = made + ":";
  }, "What a storage holds is not known any more: another process has part in it.");
  m.def("made_of", [](int64_t cdata) -> std::optional<std::string> {
    const auto& data = reinterpret_cast<c10::StorageImpl*>(cdata)->data_ptr();
    if (data.get_deleter() != &free_held) return std::nullopt;
    const auto* held = static_cast<Held*>(data.get_context());
    return held->known ? std::nullopt : std::optional<std::string>(held->made);
  }, "Of a storage whose values are not known, the operator that was left out, and the elements of its first argument.");
  m.def("set_kernels", [](const std::vector<std::string>& names, const std::vector<std::string>& dependent) {
    log_().kernels = {names.begin(), names.end()};
    log_().dependent = {dependent.begin(), dependent.end()};
  });
  m.def("set_assume", [](py::object assume) {
    delete log_().assume;
    log_().assume = assume.is_none() ? nullptr : new py::object(std::move(assume));
  });
  m.def("set_choose", [](py::object choose) {
    delete log_().choose;
    log_().choose = choose.is_none() ? nullptr : new py::object(std::move(choose));
  });
  m.def("set_libraries", [](std::vector<std::string> folders) {
    log_().libraries = std::move(folders);
    log_().is_library.clear();
  });
  m.def("rows", [] { return as_bytes(log_().rows); });
  m.def("operands", [] { return as_bytes(log_().operands); });
  m.def("names", [] { return log_().names; });
  m.def("lines", [] { return log_().lines; });
}
