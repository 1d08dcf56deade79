// A device beside the CPU, in its memory, for tests on machines without a GPU.
//
// Its tensors are PyTorch's PrivateUse1 tensors. Every operator takes them to the CPU, computes and
// takes the result back; operators on tensors of both devices are refused, as a GPU's are.
// https://pytorch.org/tutorials/advanced/privateuseone.html

#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::SymIntArrayRef;

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kType;
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* own = storage.unsafeGetStorageImpl();
    auto data = allocator.allocate(bytes);
    std::memcpy(data.get(), own->data(), std::min(bytes, own->nbytes()));
    own->set_data_ptr_noswap(std::move(data));
    own->set_nbytes(bytes);
  }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// The same memory as a CPU's tensor.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  const auto options = tensor.options().device(at::kCPU).requires_grad(false);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

Tensor on_device(const Tensor& tensor) { return tensor.defined() ? tensor.to(kDevice) : tensor; }

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
             std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                     std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device>, std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, type);
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef symbolic,
                      std::optional<c10::MemoryFormat>) {
  const auto size = C10_AS_INTARRAYREF_SLOW(symbolic);
  auto* own = self.unsafeGetTensorImpl();
  const size_t end = own->storage_offset() + c10::multiply_integers(size);
  if (end * self.element_size() > self.storage().nbytes())
    hooks.resizePrivateUse1Bytes(self.storage(), end * self.element_size());
  own->set_sizes_contiguous(size);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar item(const Tensor& self) { return on_cpu(self).item(); }

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride,
                  std::optional<c10::SymInt> symbolic) {
  std::optional<int64_t> offset;
  if (symbolic) offset = symbolic->expect_int();
  return at::cpu::as_strided(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                             offset);
}

Tensor view(const Tensor& self, SymIntArrayRef symbolic) {
  const auto size = at::infer_size(C10_AS_INTARRAYREF_SLOW(symbolic), self.numel());
  const auto stride = at::detail::computeStride(self.sizes(), self.strides(), size);
  TORCH_CHECK(stride.has_value(), "view: these strides need a copy: use reshape");
  return at::cpu::as_strided(self, size, *stride, self.storage_offset());
}

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return as_strided(self, size, stride, self.sym_storage_offset());
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t length, int64_t step) {
  dimension = c10::maybe_wrap_dim(dimension, self.dim());
  auto size = self.sizes().vec(), stride = self.strides().vec();
  size.push_back(length);
  stride.push_back(stride[dimension]);
  size[dimension] = (size[dimension] - length) / step + 1;
  stride[dimension] *= step;
  return at::cpu::as_strided(self, size, stride, self.storage_offset());
}

Tensor& set_storage(Tensor& self, at::Storage storage, c10::SymInt offset, SymIntArrayRef size,
                    SymIntArrayRef stride) {
  auto* own = self.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(storage);
  own->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                             offset.expect_int());
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const int64_t length = storage.nbytes() / self.element_size();
  return set_storage(self, storage, 0, c10::SymIntArrayRef({length}), c10::SymIntArrayRef({1}));
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   bool transposed, SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<Tensor> own;
  if (bias && bias->defined()) own = on_cpu(*bias);
  return on_device(at::convolution_symint(on_cpu(input), on_cpu(weight), own, stride, padding,
                                          dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed,
    SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  const std::vector<c10::SymInt> bias{weight.sym_size(0)};
  const auto [to_input, to_weight, to_bias] = at::convolution_backward_symint(
      on_cpu(grad).contiguous(), on_cpu(input), on_cpu(weight), at::OptionalSymIntArrayRef(bias),
      stride, padding, dilation, transposed, output_padding, groups, mask);
  return {on_device(to_input), on_device(to_weight), on_device(to_bias)};
}

// As a GPU: a number of the CPU goes with any tensor, and indices may be there too.
void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const bool takes_indices = op.schema().name().find("index") != std::string::npos;
  bool here = false, there = false;
  const auto look = [&](const Tensor& tensor, bool is_index) {
    if (!tensor.defined()) return;
    here |= tensor.device().type() == kType;
    there |= tensor.is_cpu() && tensor.dim() > 0 && !is_index;
  };
  for (size_t place = 0; place < arguments.size(); ++place) {
    const auto& value = torch::jit::peek(*stack, place, arguments.size());
    if (value.isTensor()) {
      look(value.toTensor(), false);
    } else if (value.isList()) {
      for (const c10::IValue& entry : value.toListRef())
        if (entry.isTensor()) look(entry.toTensor(), takes_indices);
    }
  }
  TORCH_CHECK(!(here && there), op.schema().name(), ": tensors of two devices");
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

