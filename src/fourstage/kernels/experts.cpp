// Experts and their gradients: a thread takes some rows of one expert through all of it, while they
// are in its cache.
//
// Shape legend: N tokens, D d_model, E experts, K of them a token, M = N K choices (choice c is
// token c / K's), F d_expert.
#include <vector>

#include "kernels.h"

namespace {

constexpr int BLOCK = 64;  // rows at once: with an expert's weights they fit in a core's cache
constexpr int PART = 512;  // rows, whose gradients of the weights are summed by one thread

struct Rows {
  int expert, begin, end;  // in the order of experts
};

// All rows, at most `most` of one expert together.
std::vector<Rows> pieces(int E, const int32_t* ends, int most) {
  std::vector<Rows> found;
  for (int e = 0, begin = 0; e < E; e++)
    for (; begin < ends[e]; begin = std::min(begin + most, ends[e]))
      found.push_back({e, begin, std::min(begin + most, ends[e])});
  return found;
}

// No place beyond memory: experts end one after the other, the last at M, and choices are below M.
void check(int M, int E, const int64_t* order, const int32_t* ends) {
  const bool ascend = std::is_sorted(ends, ends + E) && (!E || ends[0] >= 0);
  if (!ascend || (E ? ends[E - 1] : 0) != M) throw std::invalid_argument("experts have wrong ends");
  if (std::any_of(order, order + M, [&](int64_t choice) { return choice < 0 || choice >= M; }))
    throw std::invalid_argument("the order of the choices holds others");
}

// y [N, D] = the sum of each token's K rows of parts
void combine(int threads, int N, int K, int D, const float* parts, float* y) {
  in_parallel((N + BLOCK - 1) / BLOCK, threads, [&](int block) {
    for (long n = (long)block * BLOCK; n < std::min(N, (block + 1) * BLOCK); n++)
      for (int i = 0; i < D; i += W) {
        vec total = load(parts + n * K * D + i);
        for (int k = 1; k < K; k++) total += load(parts + (n * K + k) * D + i);
        store(y + n * D + i, total);
      }
  });
}

}  // namespace

extern "C" {

// y [N, D] of x [N, D]; order [M]: the choices by expert, each expert's end at ends [E].
// gate_up [M, 2 F], in that order, is kept for the gradient.
Error experts_forward(int threads, int N, int K, int E, int D, int F, const float* x,
                      const float* gate_up_w, const float* down_w, const float* gates,
                      const int64_t* order, const int32_t* ends, float* y, float* gate_up) try {
  check(N * K, E, order, ends);
  const auto work = pieces(E, ends, BLOCK);
  auto parts = floats((long)N * K * D);
  in_parallel(work.size(), threads, [&](int i) {
    const auto [e, begin, end] = work[i];
    const int n = end - begin;
    auto memory = floats((long)n * (D + F));
    float *rows = memory.get(), *active = rows + (long)n * D, *pre = gate_up + (long)begin * 2 * F;
    for (int m = 0; m < n; m++)
      std::memcpy(rows + (long)m * D, x + order[begin + m] / K * D, D * sizeof(float));
    product(rows, D, n, D, gate_up_w + (long)e * D * 2 * F, 2 * F, 2 * F, pre, 2 * F);
    swiglu(pre, n, F, active);
    product(active, F, n, F, down_w + (long)e * F * D, D, D, rows, D);
    for (int m = 0; m < n; m++) {
      const int64_t choice = order[begin + m];
      float* to = parts.get() + choice * D;
      for (int j = 0; j < D; j += W) store(to + j, load(rows + (long)m * D + j) * gates[choice]);
    }
  });
  combine(threads, N, K, D, parts.get(), y);
  return nullptr;
} catch (...) {
  return reason();
}

Error experts_backward(int threads, int N, int K, int E, int D, int F, const float* x,
                       const float* gate_up_w, const float* down_w, const float* gates,
                       const int64_t* order, const int32_t* ends, const float* gate_up,
                       const float* grad, float* grad_x, float* grad_gate_up_w, float* grad_down_w,
                       float* grad_gates) try {
  check(N * K, E, order, ends);
  const long up_size = (long)D * 2 * F, down_size = (long)F * D, size = up_size + down_size;
  auto turned = floats(E * size);
  in_parallel(E, threads, [&](int e) {
    float* to = turned.get() + e * size;
    turn(gate_up_w + e * up_size, 2 * F, D, 2 * F, to, D);
    turn(down_w + e * down_size, D, F, D, to + up_size, F);
  });

  // an expert's first part writes its gradients in place, the others elsewhere
  const auto work = pieces(E, ends, PART);
  auto grads = floats(work.size() * size), parts = floats((long)N * K * D);
  in_parallel(work.size(), threads, [&](int i) {
    const auto [e, first, last] = work[i];
    const float *up_turned = turned.get() + e * size, *down_turned = up_turned + up_size;
    float *grad_up = grads.get() + i * size, *grad_down = grad_up + up_size;
    std::fill(grad_up, grad_up + size, 0.0f);
    auto memory = floats((long)BLOCK * (2 * D + 4 * F));
    float *rows = memory.get(), *grad_rows = rows + BLOCK * D, *active = grad_rows + BLOCK * D;
    float *grad_active = active + BLOCK * F, *grad_pre = grad_active + BLOCK * F;
    for (int begin = first; begin < last; begin += BLOCK) {
      const int n = std::min(BLOCK, last - begin);
      for (int m = 0; m < n; m++) {
        const int64_t token = order[begin + m] / K;
        std::memcpy(rows + (long)m * D, x + token * D, D * sizeof(float));
        std::memcpy(grad_rows + (long)m * D, grad + token * D, D * sizeof(float));
      }
      product(grad_rows, D, n, D, down_turned, F, F, grad_active, F);
      for (int m = 0; m < n; m++) {
        const int64_t choice = order[begin + m];
        float *a = active + (long)m * F, *g = grad_active + (long)m * F;
        swiglu_backward(gate_up + (begin + m) * 2L * F, g, gates[choice], F,
                        grad_pre + (long)m * 2 * F, a);
        grad_gates[choice] = dot(g, a, F);
        for (int j = 0; j < F; j += W) store(a + j, load(a + j) * gates[choice]);
      }
      product<true, true>(active, F, F, n, grad_rows, D, D, grad_down, D);
      product<true, true>(rows, D, D, n, grad_pre, 2 * F, 2 * F, grad_up, 2 * F);
      product(grad_pre, 2 * F, n, 2 * F, up_turned, D, D, grad_rows, D);
      for (int m = 0; m < n; m++)
        std::memcpy(parts.get() + order[begin + m] * D, grad_rows + (long)m * D, D * sizeof(float));
    }
  });
  combine(threads, N, K, D, parts.get(), grad_x);
  in_parallel(E, threads, [&](int e) {
    float *up = grad_gate_up_w + e * up_size, *down = grad_down_w + e * down_size;
    std::fill(up, up + up_size, 0.0f);
    std::fill(down, down + down_size, 0.0f);
    for (size_t i = 0; i < work.size(); i++) {
      if (work[i].expert != e) continue;
      const float* from = grads.get() + i * size;
      for (long j = 0; j < up_size; j += W) store(up + j, load(up + j) + load(from + j));
      for (long j = 0; j < down_size; j += W)
        store(down + j, load(down + j) + load(from + up_size + j));
    }
  });
  return nullptr;
} catch (...) {
  return reason();
}

}  // extern "C"
