// The head over one chunk of rows on a CPU: a bfloat16 GEMM that keeps its float32 accumulators, with
// the row statistics taken while a block of logits is still in cache, and the logits' gradient.
//
// torch has no CPU GEMM with bfloat16 operands and a float32 result. The micro-kernel under both its
// GEMMs and its attention (oneDNN's brgemm: AVX-512 or AMX) has, and libtorch exports it.
//
// Shape letters: C rows of the chunk, D hidden (even), V vocabulary.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kColumns = 64;  // Vocabulary entries of a block: four vectors of 16.
constexpr int64_t kRows = 64;     // Rows of a block: 64 x 64 floats stay in the L1 cache.

// z = softcap * tanh(scale * raw / softcap) / temperature; softcap 0 leaves the tanh out.
struct Transform {
  float scale, softcap, temperature;

  Vec apply(Vec raw) const {
    if (softcap == 0) return raw * Vec(scale / temperature);
    return (raw * Vec(scale / softcap)).tanh() * Vec(softcap / temperature);
  }

  // dz / draw from z itself.
  Vec slope(Vec z) const {
    if (softcap == 0) return Vec(scale / temperature);
    const Vec tanh = z * Vec(temperature / softcap);
    return (Vec(1) - tanh * tanh) * Vec(scale / temperature);
  }
};

// Rows w[0..n) of the head as the micro-kernel wants them: pairs of neighbouring hidden units are
// one 32-bit element, and those are transposed to [D / 2, kColumns].
void pack(const BFloat16* weight, int64_t stride, int64_t n, int64_t width, BFloat16* packed) {
  const auto* source = reinterpret_cast<const float*>(weight);
  auto* target = reinterpret_cast<float*>(packed);
  for (int64_t j = 0; j < n; j += 16) {
    for (int64_t k = 0; k < width / 2; k += 16) {
      at::vec::transpose_mxn<float>(
          source + j * (stride / 2) + k, stride / 2, target + k * kColumns + j, kColumns,
          static_cast<int>(std::min<int64_t>(16, n - j)),
          static_cast<int>(std::min<int64_t>(16, width / 2 - k)));
    }
  }
}

float largest(const float* z, int64_t n) {
  return at::vec::reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, z, n);
}

// Per row and block of the vocabulary: the largest logit m, sum of e^(z - m), and, for the
// entropy, sum of (z - m) e^(z - m).
struct BlockStatistics {
  std::vector<float> max, total, weighted;

  BlockStatistics(int64_t count, bool with_entropy)
      : max(count), total(count), weighted(with_entropy ? count : 0) {}

  void add(int64_t at, const float* z, int64_t n) {
    const float m = largest(z, n);
    Vec total_vec(0), weighted_vec(0);
    for (int64_t j = 0; j < n; j += Vec::size()) {
      const int64_t size = std::min<int64_t>(Vec::size(), n - j);
      // Lanes beyond the row hold -inf, whose exponential is 0.
      const Vec shifted = Vec::set(Vec(-INFINITY), Vec::loadu(z + j, size) - Vec(m), size);
      const Vec e = shifted.exp();
      total_vec = total_vec + e;
      if (!weighted.empty()) {
        weighted_vec = weighted_vec + Vec::set(Vec(0), shifted * e, size);
      }
    }
    const auto plus = [](Vec a, Vec b) { return a + b; };
    max[at] = m;
    total[at] = at::vec::vec_reduce_all<float>(plus, total_vec);
    if (!weighted.empty()) weighted[at] = at::vec::vec_reduce_all<float>(plus, weighted_vec);
  }
};

// Logits z = transform(inputs weight^T + bias) [C, V] and their row statistics [C]: the largest
// logit, the logarithm of sum e^(z - max), and the entropy where asked for.
std::tuple<Tensor, Tensor, std::optional<Tensor>> project(
    const Tensor& inputs, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
    double softcap, double temperature, bool with_entropy, Tensor logits) {
  const int64_t num_rows = inputs.size(0), width = inputs.size(1), vocab = weight.size(0);
  const int64_t num_blocks = (vocab + kColumns - 1) / kColumns;
  const Transform transform{float(scale), float(softcap), float(temperature)};
  const auto* x = inputs.const_data_ptr<BFloat16>();
  const auto* w = weight.const_data_ptr<BFloat16>();
  const auto* b = bias ? bias->const_data_ptr<float>() : nullptr;
  auto* z = logits.mutable_data_ptr<float>();
  const int64_t z_stride = logits.stride(0);
  BlockStatistics blocks(num_rows * num_blocks, with_entropy);

  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<BFloat16> packed(width * kColumns);
    std::vector<float> tile(kRows * kColumns);
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * kColumns, n = std::min(kColumns, vocab - column);
      pack(w + column * weight.stride(0), weight.stride(0), n, width, packed.data());
      for (int64_t row = 0; row < num_rows; row += kRows) {
        const int64_t m = std::min(kRows, num_rows - row);
        at::native::cpublas::brgemm(
            m, n, width, inputs.stride(0), kColumns, kColumns, /*add_C=*/false,
            x + row * inputs.stride(0), packed.data(), tile.data());
        for (int64_t i = 0; i < m; ++i) {
          float* out = z + (row + i) * z_stride + column;
          for (int64_t j = 0; j < n; j += Vec::size()) {
            const int64_t size = std::min<int64_t>(Vec::size(), n - j);
            Vec raw = Vec::loadu(tile.data() + i * kColumns + j, size);
            if (b != nullptr) raw = raw + Vec::loadu(b + column + j, size);
            transform.apply(raw).store(out + j, size);
          }
          blocks.add((row + i) * num_blocks + block, out, n);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });

  Tensor max_logit = at::empty({num_rows}, logits.options());
  Tensor log_total = at::empty({num_rows}, logits.options());
  std::optional<Tensor> entropy;
  if (with_entropy) entropy = at::empty({num_rows}, logits.options());
  auto* max_out = max_logit.mutable_data_ptr<float>();
  auto* total_out = log_total.mutable_data_ptr<float>();
  auto* entropy_out = with_entropy ? entropy->mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, num_rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t start = i * num_blocks;
      const float m = largest(blocks.max.data() + start, num_blocks);
      double total = 0, weighted = 0;
      for (int64_t k = start; k < start + num_blocks; ++k) {
        const double shift = double(blocks.max[k]) - m;
        // A block at -inf adds nothing; -inf * 0 would be NaN.
        const double factor = std::exp(shift);
        if (factor == 0) continue;
        total += factor * blocks.total[k];
        if (with_entropy) weighted += factor * (blocks.weighted[k] + shift * blocks.total[k]);
      }
      max_out[i] = m;
      total_out[i] = float(std::log(total));
      if (with_entropy) entropy_out[i] = float(std::log(total) - weighted / total);
    }
  });
  return {max_logit, log_total, entropy};
}

// dL/draw = (1[y] g - p (g + dH (log p + H))) dz/draw, written as bfloat16 over the logits' own
// memory: entry j of a row lies at byte 2 j, behind what is still to be read.
void logit_gradients(
    Tensor logits, const Tensor& target_ids, const Tensor& max_logit, const Tensor& log_total,
    const Tensor& grad_log_probs, const std::optional<Tensor>& grad_entropy,
    const std::optional<Tensor>& entropy, double scale, double softcap, double temperature) {
  const int64_t num_rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  const Transform transform{float(scale), float(softcap), float(temperature)};
  auto* z = logits.mutable_data_ptr<float>();
  const auto* target = target_ids.const_data_ptr<int64_t>();
  const auto* max_in = max_logit.const_data_ptr<float>();
  const auto* total_in = log_total.const_data_ptr<float>();
  const auto* g_in = grad_log_probs.const_data_ptr<float>();
  const auto* dh_in = grad_entropy ? grad_entropy->const_data_ptr<float>() : nullptr;
  const auto* h_in = grad_entropy ? entropy->const_data_ptr<float>() : nullptr;

  at::parallel_for(0, num_rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float* row = z + i * stride;
      auto* out = reinterpret_cast<BFloat16*>(row);
      const Vec m(max_in[i]), total(total_in[i]), g(g_in[i]);
      const auto gradient = [&](Vec value) {
        const Vec log_p = value - m - total;
        Vec factor = g;
        if (dh_in != nullptr) factor = factor + Vec(dh_in[i]) * (log_p + Vec(h_in[i]));
        return log_p.exp().neg() * factor * transform.slope(value);
      };
      float at_target[Vec::size()];
      // No target (-1) where the vocabulary is shared and another rank has it.
      const int64_t y = target[i], y_start = std::max<int64_t>(y, 0) / Vec::size() * Vec::size();
      const Vec near = Vec::loadu(row + y_start, std::min<int64_t>(Vec::size(), vocab - y_start));
      (gradient(near) + g * transform.slope(near)).store(at_target);
      int64_t j = 0;
      for (; j + 2 * Vec::size() <= vocab; j += 2 * Vec::size()) {
        const Vec low = gradient(Vec::loadu(row + j));
        const Vec high = gradient(Vec::loadu(row + j + Vec::size()));
        at::vec::convert_from_float<BFloat16>(low, high).store(out + j);
      }
      for (; j < vocab; ++j) {
        float lanes[Vec::size()];
        gradient(Vec(row[j])).store(lanes);
        out[j] = lanes[0];
      }
      if (y >= 0) out[y] = at_target[y - y_start];
    }
  });
}

// Columns [first, first + n) of rows x[0..C) as the micro-kernel's right operand: pairs of
// neighbouring rows side by side, [ceil(C / 2), kColumns, 2], zeros beyond the edges.
void pack_rows(
    const BFloat16* x, int64_t stride, int64_t num_rows, int64_t first, int64_t n,
    BFloat16* packed) {
  for (int64_t i = 0; i < num_rows + num_rows % 2; ++i) {
    BFloat16* pair = packed + i / 2 * 2 * kColumns + i % 2;
    for (int64_t j = 0; j < n; ++j) {
      pair[2 * j] = i < num_rows ? x[i * stride + first + j] : BFloat16(0);
    }
  }
}

template <typename scalar>
void add_rows(
    const float* tile, int64_t m, int64_t n, scalar* out, int64_t stride, bool overwrite) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      scalar& entry = out[i * stride + j];
      const float sum = tile[i * kColumns + j] + (overwrite ? 0.0f : float(entry));
      entry = scalar(sum);
    }
  }
}

// into [V, D] (= or +=) dZ^T [V, C] x [C, D], every sum in float32 before it is stored.
void add_weight_gradient(
    const Tensor& grad_logits, const Tensor& inputs, Tensor into, bool overwrite) {
  const int64_t num_rows = inputs.size(0), width = inputs.size(1), vocab = into.size(0);
  const int64_t depth = num_rows + num_rows % 2;
  const int64_t num_panels = (width + kColumns - 1) / kColumns;
  const int64_t num_blocks = (vocab + kRows - 1) / kRows;
  const auto* dz = grad_logits.const_data_ptr<BFloat16>();
  const auto* x = inputs.const_data_ptr<BFloat16>();
  const int64_t dz_stride = grad_logits.stride(0), stride = into.stride(0);
  const bool is_wide = into.scalar_type() == at::kFloat;
  TORCH_CHECK(is_wide || into.scalar_type() == at::kBFloat16, "into: float32 or bfloat16");
  TORCH_CHECK(into.stride(1) == 1, "into: contiguous rows");
  void* out = into.mutable_data_ptr();
  std::vector<BFloat16> packed(num_panels * depth * kColumns, BFloat16(0));
  at::parallel_for(0, num_panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t column = panel * kColumns;
      pack_rows(
          x, inputs.stride(0), num_rows, column, std::min(kColumns, width - column),
          packed.data() + panel * depth * kColumns);
    }
  });

  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<BFloat16> turned(kRows * depth, BFloat16(0));
    std::vector<float> tile(kRows * kColumns, 0.0f);
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block * kRows, m = std::min(kRows, vocab - row);
      for (int64_t i = 0; i < num_rows; i += 32) {
        for (int64_t j = 0; j < m; j += 32) {
          at::vec::transpose_mxn<BFloat16>(
              dz + i * dz_stride + row + j, dz_stride, turned.data() + j * depth + i, depth,
              static_cast<int>(std::min<int64_t>(32, num_rows - i)),
              static_cast<int>(std::min<int64_t>(32, m - j)));
        }
      }
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const int64_t column = panel * kColumns, n = std::min(kColumns, width - column);
        if (depth > 0) {
          at::native::cpublas::brgemm(
              m, n, depth, depth, kColumns, kColumns, /*add_C=*/false, turned.data(),
              packed.data() + panel * depth * kColumns, tile.data());
        }
        const int64_t at = row * stride + column;
        if (is_wide) {
          add_rows(tile.data(), m, n, static_cast<float*>(out) + at, stride, overwrite);
        } else {
          add_rows(tile.data(), m, n, static_cast<BFloat16*>(out) + at, stride, overwrite);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace

TORCH_LIBRARY(care_kernels, library) {
  library.def(
      "project(Tensor inputs, Tensor weight, Tensor? bias, float scale, float softcap, "
      "float temperature, bool with_entropy, Tensor(a!) logits) -> (Tensor, Tensor, Tensor?)");
  library.def(
      "logit_gradients(Tensor(a!) logits, Tensor target_ids, Tensor max_logit, Tensor log_total, "
      "Tensor grad_log_probs, Tensor? grad_entropy, Tensor? entropy, float scale, float softcap, "
      "float temperature) -> ()");
  library.def(
      "add_weight_gradient(Tensor grad_logits, Tensor inputs, Tensor(a!) into, bool overwrite) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(care_kernels, CPU, library) {
  library.impl("project", &project);
  library.impl("logit_gradients", &logit_gradients);
  library.impl("add_weight_gradient", &add_weight_gradient);
}
