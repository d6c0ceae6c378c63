/* Plain BLAS/LAPACK names for the OpenBLAS that PyPI's scipy-openblas32 ships under prefixed ones.
 *
 * Each function is one jump, so arguments and return values pass through untouched. The list is what
 * MLX's CPU backend leaves undefined (nm -D --undefined-only libmlx.so).
 */
#if defined(__x86_64__)
#define JUMP(name) __asm__(".globl " #name "\n.type " #name ", @function\n" #name ": jmp scipy_" #name "@PLT\n");
#elif defined(__aarch64__)
#define JUMP(name) __asm__(".globl " #name "\n.type " #name ", %function\n" #name ": b scipy_" #name "\n");
#else
#error "no jump written for this processor"
#endif

JUMP(cblas_sgemm) JUMP(cblas_dgemm) JUMP(cblas_cgemm)
JUMP(sgesdd_) JUMP(dgesdd_) JUMP(cgesdd_)
JUMP(sgeev_) JUMP(dgeev_) JUMP(cgeev_)
JUMP(ssyevd_) JUMP(dsyevd_) JUMP(cheevd_)
JUMP(sgeqrf_) JUMP(dgeqrf_) JUMP(sorgqr_) JUMP(dorgqr_)
JUMP(sgetrf_) JUMP(dgetrf_) JUMP(sgetri_) JUMP(dgetri_)
JUMP(spotrf_) JUMP(dpotrf_) JUMP(strtri_) JUMP(dtrtri_)
