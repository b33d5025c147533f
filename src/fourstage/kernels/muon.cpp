// Newton-Schulz iterations of Muon: a matrix stays in a core's cache for all of them.
//
// Shape legend: M matrices, R rows, C columns, R >= C, I iterations, L = 3
// coefficients of each.
#include "kernels.h"

// x [M, R, C], each of norm 1 -> y, about U V^T of each U S V^T. An iteration with the next row
// (a, b, c) of coefficients [I, L]: y <- a y + y (b g + c g g), g = y^T y.
extern "C" Error newton_schulz(int threads, int M, int R, int C, int I, int L,
                               const float* x, const float* coefficients, float* y) {
  return guarded([&] {
    require(L == 3, "an iteration has three coefficients");
    in_parallel(M, threads, [&](int matrix) {
      auto memory = floats((long)C * (2 * C + R));
      float *gram = memory.get(), *factor = gram + C * C, *step = factor + C * C;
      float* rows = y + (long)matrix * R * C;
      std::copy_n(x + (long)matrix * R * C, (long)R * C, rows);
      for (int i = 0; i < I; i++) {
        const float *abc = coefficients + L * i, a = abc[0], b = abc[1], c = abc[2];
        product<false, true>(rows, C, C, R, rows, C, C, gram, C);
        product(gram, C, C, C, gram, C, C, factor, C);
        for (long j = 0; j < (long)C * C; j += W)
          store(factor + j, b * load(gram + j) + c * load(factor + j));
        product(rows, C, R, C, factor, C, C, step, C);
        for (long j = 0; j < (long)R * C; j += W)
          store(rows + j, a * load(rows + j) + load(step + j));
      }
    });
  });
}
