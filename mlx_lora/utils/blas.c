/* Plain BLAS/LAPACK names for the OpenBLAS that PyPI's scipy-openblas32 ships under prefixed ones.
 *
 * Each function but cblas_sgemm is one jump, so arguments and return values pass through untouched. The list is
 * what MLX's CPU backend leaves undefined (nm -D --undefined-only libmlx.so).
 */
#if defined(__x86_64__)
#define JUMP(name) __asm__(".globl " #name "\n.type " #name ", @function\n" #name ": jmp scipy_" #name "@PLT\n");
#elif defined(__aarch64__)
#define JUMP(name) __asm__(".globl " #name "\n.type " #name ", %function\n" #name ": b scipy_" #name "\n");
#else
#error "no jump written for this processor"
#endif

JUMP(cblas_dgemm) JUMP(cblas_cgemm)
JUMP(sgesdd_) JUMP(dgesdd_) JUMP(cgesdd_)
JUMP(sgeev_) JUMP(dgeev_) JUMP(cgeev_)
JUMP(ssyevd_) JUMP(dsyevd_) JUMP(cheevd_)
JUMP(sgeqrf_) JUMP(dgeqrf_) JUMP(sorgqr_) JUMP(dorgqr_)
JUMP(sgetrf_) JUMP(dgetrf_) JUMP(sgetri_) JUMP(dgetri_)
JUMP(spotrf_) JUMP(dpotrf_) JUMP(strtri_) JUMP(dtrtri_)

/* OpenBLAS copies the whole weight before it multiplies a single row by it; its product of a matrix and a vector reads
 * the weight once, in about half the time. Generating text is such products, one token at a time.
 *
 * Row-major, as MLX calls it: C (m, n) = alpha op(A) op(B) + beta C.
 */
enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };

extern void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                              int lda, const float *b, int ldb, float beta, float *c, int ldc);
extern void scipy_cblas_sgemv(int order, int trans, int rows, int columns, float alpha, const float *a, int lda,
                              const float *x, int step_x, float beta, float *y, int step_y);

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  if (order == ROW_MAJOR && m == 1 && n > 0 && k > 0) { /* c^T = op(B)^T a^T */
    int plain = trans_b == PLAIN;
    scipy_cblas_sgemv(order, plain ? TRANSPOSED : PLAIN, plain ? k : n, plain ? n : k, alpha, b, ldb, a,
                      trans_a == PLAIN ? 1 : lda, beta, c, 1);
  } else if (order == ROW_MAJOR && n == 1 && m > 0 && k > 0) { /* c = op(A) b */
    int plain = trans_a == PLAIN;
    scipy_cblas_sgemv(order, trans_a, plain ? m : k, plain ? k : m, alpha, a, lda, b, trans_b == PLAIN ? ldb : 1, beta,
                      c, ldc);
  } else {
    scipy_cblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}
