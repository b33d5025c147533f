// Experts and their gradients: a thread takes some rows of one expert through all of it while they
// are in its cache.
//
// Shape legend: N tokens, D d_model, E experts, K of them chosen per token, M = N K choices (choice
// c belongs to token c / K), F d_expert, U = 2 F.
#include <vector>

#include "kernels.h"

namespace {

constexpr int PART = 512;  // rows whose gradients of the weights are summed by one thread

struct Rows {
  int expert, begin, end;  // in the order of experts
};

// All rows in pieces of one expert's rows, at most `most` each.
std::vector<Rows> pieces(int E, const int32_t* ends, int most) {
  std::vector<Rows> found;
  for (int e = 0, begin = 0; e < E; e++)
    for (; begin < ends[e]; begin = std::min(begin + most, ends[e]))
      found.push_back({e, begin, std::min(begin + most, ends[e])});
  return found;
}

// Everything that is used as an address stays inside the tensors.
void check(int N, int E, int U, int F, int K, int M, const int64_t* order, const int32_t* ends) {
  require(U == 2 * F && M == (long)N * K, "the widths or the number of choices don't match");
  const bool ascending = std::is_sorted(ends, ends + E) && (!E || ends[0] >= 0);
  require(ascending && (E ? ends[E - 1] : 0) == M, "the experts' ends don't cover all choices");
  require(std::all_of(order, order + M, [&](int64_t choice) { return 0 <= choice && choice < M; }),
          "the order of the choices has other numbers");
}

// y [N, D] = the sum of each token's K rows of parts [M, D]
void combine(int threads, int N, int K, int D, const float* parts, float* y) {
  in_blocks(N, threads, [&](int, long first, long last) {
    for (long n = first; n < last; n++)
      for (int i = 0; i < D; i += W) {
        vec total = load(parts + n * K * D + i);
        for (int k = 1; k < K; k++) total += load(parts + (n * K + k) * D + i);
        store(y + n * D + i, total);
      }
  });
}

}  // namespace

// y [N, D] of x [N, D]; order [M]: the choices sorted by expert; ends [E]: where each expert's end.
// gate_up [M, U], in that order, is kept for the gradient.
extern "C" Error experts_forward(int threads, int N, int D, int E, int U, int F, int K, int M,
                                 const float* x, const float* gate_up_w, const float* down_w,
                                 const float* gates, const int64_t* order, const int32_t* ends,
                                 float* y, float* gate_up) {
  return guarded([&] {
    check(N, E, U, F, K, M, order, ends);
    const auto work = pieces(E, ends, BLOCK);
    auto parts = floats((long)M * D);
    in_parallel(work.size(), threads, [&](int i) {
      const auto [e, begin, end] = work[i];
      const int n = end - begin;
      auto memory = floats((long)n * (D + F));
      float *rows = memory.get(), *active = rows + (long)n * D, *pre = gate_up + (long)begin * U;
      for (int m = 0; m < n; m++)
        std::memcpy(rows + (long)m * D, x + order[begin + m] / K * D, D * sizeof(float));
      product(rows, D, n, D, gate_up_w + (long)e * D * U, U, U, pre, U);
      swiglu(pre, n, F, active);
      product(active, F, n, F, down_w + (long)e * F * D, D, D, rows, D);
      for (int m = 0; m < n; m++) {
        const int64_t choice = order[begin + m];
        float* to = parts.get() + choice * D;
        for (int j = 0; j < D; j += W) store(to + j, load(rows + (long)m * D + j) * gates[choice]);
      }
    });
    combine(threads, N, K, D, parts.get(), y);
  });
}

extern "C" Error experts_backward(int threads, int N, int D, int E, int U, int F, int K, int M,
                                  const float* x, const float* gate_up_w, const float* down_w,
                                  const float* gates, const int64_t* order, const int32_t* ends,
                                  const float* gate_up, const float* grad, float* grad_x,
                                  float* grad_gate_up_w, float* grad_down_w, float* grad_gates) {
  return guarded([&] {
    check(N, E, U, F, K, M, order, ends);
    const long up_size = (long)D * U, down_size = (long)F * D, size = up_size + down_size;
    auto transposed = floats(E * size);
    in_parallel(E, threads, [&](int e) {
      float* to = transposed.get() + e * size;
      transpose(gate_up_w + e * up_size, U, D, U, to, D);
      transpose(down_w + e * down_size, D, F, D, to + up_size, F);
    });

    const auto work = pieces(E, ends, PART);
    auto grads = floats(work.size() * size), parts = floats((long)M * D);
    in_parallel(work.size(), threads, [&](int i) {
      const auto [e, first, last] = work[i];
      const float *up_transposed = transposed.get() + e * size;
      const float *down_transposed = up_transposed + up_size;
      float *grad_up = grads.get() + i * size, *grad_down = grad_up + up_size;
      std::fill(grad_up, grad_up + size, 0.0f);
      auto memory = floats((long)BLOCK * (2 * D + 2 * F + U));
      float *rows = memory.get(), *grad_rows = rows + BLOCK * D, *active = grad_rows + BLOCK * D;
      float *grad_active = active + BLOCK * F, *grad_pre = grad_active + BLOCK * F;
      for (int begin = first; begin < last; begin += BLOCK) {
        const int n = std::min(BLOCK, last - begin);
        for (int m = 0; m < n; m++) {
          const int64_t token = order[begin + m] / K;
          std::memcpy(rows + (long)m * D, x + token * D, D * sizeof(float));
          std::memcpy(grad_rows + (long)m * D, grad + token * D, D * sizeof(float));
        }
        product(grad_rows, D, n, D, down_transposed, F, F, grad_active, F);
        for (int m = 0; m < n; m++) {
          const int64_t choice = order[begin + m];
          float *a = active + (long)m * F, *g = grad_active + (long)m * F;
          swiglu_backward(gate_up + (begin + m) * (long)U, g, gates[choice], F,
                          grad_pre + (long)m * U, a);
          grad_gates[choice] = dot(g, a, F);
          for (int j = 0; j < F; j += W) store(a + j, load(a + j) * gates[choice]);
        }
        product<true, true>(active, F, F, n, grad_rows, D, D, grad_down, D);
        product<true, true>(rows, D, D, n, grad_pre, U, U, grad_up, U);
        product(grad_pre, U, n, U, up_transposed, D, D, grad_rows, D);
        for (int m = 0; m < n; m++)
          std::memcpy(parts.get() + order[begin + m] * D, grad_rows + (long)m * D,
                      D * sizeof(float));
      }
    });
    combine(threads, N, K, D, parts.get(), grad_x);
    in_parallel(E, threads, [&](int e) {
      const auto is_before = [](const Rows& piece, int expert) { return piece.expert < expert; };
      const auto first = std::lower_bound(work.begin(), work.end(), e, is_before);
      const auto last = std::lower_bound(first, work.end(), e + 1, is_before);
      const float* from = grads.get() + (first - work.begin()) * size;
      add_up(from, size, last - first, up_size, grad_gate_up_w + e * up_size);
      add_up(from + up_size, size, last - first, down_size, grad_down_w + e * down_size);
    });
  });
}
