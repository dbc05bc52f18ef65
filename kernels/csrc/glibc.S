/* SPDX-License-Identifier: Apache-2.0 */
/* Compiled on a newer Linux, the library still loads where glibc is 2.28, the oldest that torch runs on.
 *
 * glibc 2.34 moved libpthread, libdl and librt into libc, and their functions got a second, newer version there. Calls
 * from CUDA's static runtime and from libstdc++ would be bound to that one. The functions below are hidden, so such
 * calls end here, and each goes on to the version that it had before. The linker drops those that nothing calls.
 *
 * What is missing in the table makes no wrong library: a wheel's tag is computed from the versions that are asked for.
 */
#if defined(__x86_64__)
#define JUMP jmp
#define VERSION(of_x86_64) of_x86_64
#elif defined(__aarch64__)
#define JUMP b
#define VERSION(of_x86_64) GLIBC_2.17 /* glibc's first there */
#else
#error "the versions of glibc's functions are known for x86-64 and aarch64 only"
#endif

.macro forward version, names:vararg
.irp name, \names
  .section .text.\name, "ax", %progbits
  .symver before_\name, \name@\version
  .globl \name
  .hidden \name
  .type \name, %function
\name:
  JUMP before_\name
  .size \name, . - \name
.endr
.endm

forward VERSION(GLIBC_2.2.5), dladdr, dlclose, dlerror, dlopen, dlsym, dlvsym, shm_open, shm_unlink
forward VERSION(GLIBC_2.2.5), pthread_attr_getguardsize, pthread_attr_getstack, pthread_attr_getstacksize
forward VERSION(GLIBC_2.2.5), pthread_attr_setguardsize, pthread_attr_setstack, pthread_attr_setstacksize
forward VERSION(GLIBC_2.2.5), pthread_barrier_destroy, pthread_barrier_init, pthread_barrier_wait
forward VERSION(GLIBC_2.2.5), pthread_barrierattr_destroy, pthread_barrierattr_init, pthread_barrierattr_setpshared
forward VERSION(GLIBC_2.2.5), pthread_cancel, pthread_condattr_getpshared, pthread_condattr_setpshared, pthread_create
forward VERSION(GLIBC_2.2.5), pthread_detach, pthread_getspecific, pthread_join, pthread_key_create, pthread_key_delete
forward VERSION(GLIBC_2.2.5), pthread_kill, pthread_mutex_timedlock, pthread_mutex_trylock, pthread_mutexattr_destroy
forward VERSION(GLIBC_2.2.5), pthread_mutexattr_getpshared, pthread_mutexattr_gettype, pthread_mutexattr_init
forward VERSION(GLIBC_2.2.5), pthread_mutexattr_setpshared, pthread_mutexattr_settype, pthread_once, pthread_rwlock_destroy
forward VERSION(GLIBC_2.2.5), pthread_rwlock_init, pthread_rwlock_rdlock, pthread_rwlock_timedrdlock
forward VERSION(GLIBC_2.2.5), pthread_rwlock_timedwrlock, pthread_rwlock_tryrdlock, pthread_rwlock_trywrlock
forward VERSION(GLIBC_2.2.5), pthread_rwlock_unlock, pthread_rwlock_wrlock, pthread_rwlockattr_destroy
forward VERSION(GLIBC_2.2.5), pthread_rwlockattr_getpshared, pthread_rwlockattr_init, pthread_rwlockattr_setpshared
forward VERSION(GLIBC_2.2.5), pthread_setspecific, pthread_spin_destroy, pthread_spin_init, pthread_spin_lock
forward VERSION(GLIBC_2.2.5), pthread_spin_trylock, pthread_spin_unlock, pthread_testcancel
forward VERSION(GLIBC_2.2.5), sem_close, sem_destroy, sem_getvalue, sem_init, sem_open, sem_post, sem_timedwait, sem_trywait
forward VERSION(GLIBC_2.2.5), sem_unlink, sem_wait
forward VERSION(GLIBC_2.3.3), dladdr1, dlinfo, pthread_condattr_getclock, pthread_condattr_setclock
forward VERSION(GLIBC_2.3.4), dlmopen
forward VERSION(GLIBC_2.4), pthread_mutexattr_getprotocol, pthread_mutexattr_setprotocol
forward VERSION(GLIBC_2.12), pthread_mutex_consistent, pthread_mutexattr_getrobust, pthread_mutexattr_setrobust
forward VERSION(GLIBC_2.12), pthread_setname_np

/* From glibc 2.32 libstdc++ leaves atomic instructions out while this says that there is one thread. It never does. */
.data
.globl __libc_single_threaded
.hidden __libc_single_threaded
.type __libc_single_threaded, %object
.size __libc_single_threaded, 1
__libc_single_threaded:
  .byte 0

.section .note.GNU-stack, "", %progbits
