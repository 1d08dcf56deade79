// The head over one chunk of rows on a CPU: a bfloat16 GEMM that keeps its float32 accumulators, with
// the row statistics taken while a block of logits is still in cache, the logits' gradient, and dW.
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

#include <algorithm>
#include <cmath>
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

float sum(const float* values) {
  return at::vec::reduce_all<float>([](Vec a, Vec b) { return a + b; }, values, kColumns);
}

void store(const float* values, int64_t n, BFloat16* out) {
  constexpr int64_t step = 2 * Vec::size();
  for (int64_t j = 0; j < n; j += step) {
    const Vec low = Vec::loadu(values + j), high = Vec::loadu(values + j + Vec::size());
    at::vec::convert_from_float<BFloat16>(low, high).store(out + j, std::min(step, n - j));
  }
}

// What a row's block of the vocabulary leaves behind: the largest logit m, sum of e^(z - m) and,
// for the entropy, sum of (z - m) e^(z - m). One entry for each row and block.
struct BlockStatistics {
  float* max;
  std::vector<float> total, weighted;

  BlockStatistics(float* max, int64_t count, bool with_entropy)
      : max(max), total(count), weighted(with_entropy ? count : 0) {}

  // Takes z[0, n); leaves the exponentials in e[0, kColumns), zeros beyond n.
  void add(int64_t at, const float* z, int64_t n, float* e) {
    const float m = largest(z, n);
    float moments[kColumns];
    for (int64_t j = 0; j < kColumns; j += Vec::size()) {
      const int64_t size = std::clamp<int64_t>(n - j, 0, Vec::size());
      const Vec inside = size > 0 ? Vec::loadu(z + j, size) - Vec(m) : Vec(0);
      const Vec value = Vec::set(Vec(0), inside.exp(), size);
      value.store(e + j);
      if (!weighted.empty()) Vec::set(Vec(0), inside * value, size).store(moments + j);
    }
    max[at] = m;
    total[at] = sum(e);
    if (!weighted.empty()) weighted[at] = sum(moments);
  }
};

// z = transform(inputs weight^T + bias), of which the caller may keep the bfloat16 exponentials `exps`
// [C, V] of z minus its block's maximum.
//
// Returns, [C] each: the target's logit, the largest logit, the logarithm of sum e^(z - max), the
// entropy where asked for; and [C, blocks] the blocks' maxima.
std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, Tensor> project(
    const Tensor& inputs, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& target_ids, double scale, double softcap, double temperature, bool with_entropy,
    std::optional<Tensor> exps) {
  const int64_t num_rows = inputs.size(0), width = inputs.size(1), vocab = weight.size(0);
  const int64_t num_blocks = (vocab + kColumns - 1) / kColumns;
  const Transform transform{float(scale), float(softcap), float(temperature)};
  const auto* x = inputs.const_data_ptr<BFloat16>();
  const auto* w = weight.const_data_ptr<BFloat16>();
  const auto* b = bias ? bias->const_data_ptr<float>() : nullptr;
  const auto* target = target_ids.const_data_ptr<int64_t>();
  auto* e_out = exps ? exps->mutable_data_ptr<BFloat16>() : nullptr;
  const int64_t e_stride = exps ? exps->stride(0) : 0;
  const auto options = inputs.options().dtype(at::kFloat);
  Tensor target_logit = at::empty({num_rows}, options);
  Tensor block_max = at::empty({num_rows, num_blocks}, options);
  auto* at_target = target_logit.mutable_data_ptr<float>();
  BlockStatistics blocks(
      block_max.mutable_data_ptr<float>(), num_rows * num_blocks, with_entropy);

  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<BFloat16> packed(width * kColumns);
    std::vector<float> tile(kRows * kColumns);
    float e[kColumns];
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * kColumns, n = std::min(kColumns, vocab - column);
      pack(w + column * weight.stride(0), weight.stride(0), n, width, packed.data());
      for (int64_t row = 0; row < num_rows; row += kRows) {
        const int64_t m = std::min(kRows, num_rows - row);
        at::native::cpublas::brgemm(
            m, n, width, inputs.stride(0), kColumns, kColumns, /*add_C=*/false,
            x + row * inputs.stride(0), packed.data(), tile.data());
        for (int64_t i = row; i < row + m; ++i) {
          float* z = tile.data() + (i - row) * kColumns;
          for (int64_t j = 0; j < n; j += Vec::size()) {
            const int64_t size = std::min<int64_t>(Vec::size(), n - j);
            Vec raw = Vec::loadu(z + j, size);
            if (b != nullptr) raw = raw + Vec::loadu(b + column + j, size);
            transform.apply(raw).store(z + j, size);
          }
          if (target[i] >= column && target[i] < column + n) at_target[i] = z[target[i] - column];
          blocks.add(i * num_blocks + block, z, n, e);
          if (e_out != nullptr) store(e, n, e_out + i * e_stride + column);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });

  Tensor max_logit = at::empty({num_rows}, options), log_total = at::empty({num_rows}, options);
  std::optional<Tensor> entropy;
  if (with_entropy) entropy = at::empty({num_rows}, options);
  auto* max_out = max_logit.mutable_data_ptr<float>();
  auto* total_out = log_total.mutable_data_ptr<float>();
  auto* entropy_out = with_entropy ? entropy->mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, num_rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t start = i * num_blocks;
      const float m = largest(blocks.max + start, num_blocks);
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
  return {target_logit, max_logit, log_total, entropy, block_max};
}

// dL/draw = (1[y] g - p (g + dH (log p + H))) dz/draw over the exponentials that `project` kept,
// in their place. log p comes back from an exponential, rounded to 2^-9 of itself, for the entropy
// and the softcap's slope only; the target's own entry comes from the float32 statistics.
void exp_gradients(
    Tensor exps, const Tensor& block_max, const Tensor& target_ids, const Tensor& target_logit,
    const Tensor& log_probs, const Tensor& max_logit, const Tensor& log_total,
    const Tensor& grad_log_probs, const std::optional<Tensor>& grad_entropy,
    const std::optional<Tensor>& entropy, double scale, double softcap, double temperature) {
  const int64_t num_rows = exps.size(0), vocab = exps.size(1), stride = exps.stride(0);
  const int64_t num_blocks = block_max.size(1);
  const Transform transform{float(scale), float(softcap), float(temperature)};
  auto* e = exps.mutable_data_ptr<BFloat16>();
  const auto* maxima = block_max.const_data_ptr<float>();
  const auto* target = target_ids.const_data_ptr<int64_t>();
  const auto* z_in = target_logit.const_data_ptr<float>();
  const auto* l_in = log_probs.const_data_ptr<float>();
  const auto* max_in = max_logit.const_data_ptr<float>();
  const auto* total_in = log_total.const_data_ptr<float>();
  const auto* g_in = grad_log_probs.const_data_ptr<float>();
  const auto* dh_in = grad_entropy ? grad_entropy->const_data_ptr<float>() : nullptr;
  const auto* h_in = grad_entropy ? entropy->const_data_ptr<float>() : nullptr;
  const bool needs_logits = dh_in != nullptr || transform.softcap != 0;
  constexpr int64_t step = 2 * Vec::size();

  at::parallel_for(0, num_rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      BFloat16* row = e + i * stride;
      const float g = g_in[i], dh = dh_in != nullptr ? dh_in[i] : 0;
      const float h = dh_in != nullptr ? h_in[i] : 0;
      for (int64_t block = 0; block < num_blocks; ++block) {
        const float m = maxima[i * num_blocks + block];
        const float log_share = (m - max_in[i]) - total_in[i], share = std::exp(log_share);
        const auto gradient = [&](Vec exp) {
          if (!needs_logits) return exp * Vec(-g * share) * transform.slope(Vec(0));
          // Where the exponential is 0 so is p, and any finite logarithm will do.
          const Vec log_exp = Vec::blendv(exp, Vec(1), exp == Vec(0)).log();
          const Vec factor = Vec(g) + Vec(dh) * (log_exp + Vec(log_share + h));
          return exp * Vec(-share) * factor * transform.slope(log_exp + Vec(m));
        };
        const int64_t end = std::min((block + 1) * kColumns, vocab);
        for (int64_t j = block * kColumns; j < end; j += step) {
          const int64_t size = std::min(step, end - j);
          const auto [low, high] = at::vec::convert_to_float<BFloat16>(
              at::vec::Vectorized<BFloat16>::loadu(row + j, size));
          at::vec::convert_from_float<BFloat16>(gradient(low), gradient(high))
              .store(row + j, size);
        }
      }
      // No target (-1) where the vocabulary is shared and another rank has it.
      if (target[i] < 0) continue;
      const float at_target =
          -g * std::expm1(l_in[i]) - dh * std::exp(l_in[i]) * (l_in[i] + h);
      float slope[Vec::size()];
      transform.slope(Vec(z_in[i])).store(slope);
      row[target[i]] = at_target * slope[0];
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
      "project(Tensor inputs, Tensor weight, Tensor? bias, Tensor target_ids, float scale, "
      "float softcap, float temperature, bool with_entropy, Tensor(a!)? exps) "
      "-> (Tensor, Tensor, Tensor, Tensor?, Tensor)");
  library.def(
      "exp_gradients(Tensor(a!) exps, Tensor block_max, Tensor target_ids, Tensor target_logit, "
      "Tensor log_probs, Tensor max_logit, Tensor log_total, Tensor grad_log_probs, "
      "Tensor? grad_entropy, Tensor? entropy, float scale, float softcap, float temperature) "
      "-> ()");
  library.def(
      "add_weight_gradient(Tensor grad_logits, Tensor inputs, Tensor(a!) into, bool overwrite) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(care_kernels, CPU, library) {
  library.impl("project", &project);
  library.impl("exp_gradients", &exp_gradients);
  library.impl("add_weight_gradient", &add_weight_gradient);
}
