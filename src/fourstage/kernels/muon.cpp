// Newton-Schulz iterations of Muon: a matrix stays in a core's cache for all of them.
//
// Shape legend: M matrices, R rows, C columns, R >= C.
#include "kernels.h"

extern "C" {

// x [M, R, C], each of norm 1 -> about U V^T of each. Of an iteration: x <- a x + x (b g + c g g),
// g = x^T x; coefficients are a, b, c of each.
void orthogonalize(int threads, int M, int R, int C, const float* coefficients, int iterations,
                   float* x) {
  in_parallel(M, threads, [&](int matrix) {
    auto memory = floats((long)C * (2 * C + R));
    float *gram = memory.get(), *factor = gram + C * C, *y = factor + C * C;
    float* rows = x + (long)matrix * R * C;
    for (int i = 0; i < iterations; i++) {
      const float a = coefficients[3 * i], b = coefficients[3 * i + 1], c = coefficients[3 * i + 2];
      product<false, true>(rows, C, C, R, rows, C, C, gram, C);
      product(gram, C, C, C, gram, C, C, factor, C);
      for (long j = 0; j < (long)C * C; j += W)
        store(factor + j, b * load(gram + j) + c * load(factor + j));
      product(rows, C, R, C, factor, C, C, y, C);
      for (long j = 0; j < (long)R * C; j += W)
        store(rows + j, a * load(rows + j) + load(y + j));
    }
  });
}

}  // extern "C"
