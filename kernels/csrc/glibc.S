/* SPDX-License-Identifier: Apache-2.0 */
/* Compiled on a newer Linux, the library still loads where glibc is 2.28, the oldest that torch runs on.
 *
 * glibc 2.34 moved libpthread, libdl and librt into libc, and their functions got a second, newer version there. Calls
 * from CUDA's static runtime and from libstdc++ would be bound to that one. The functions below are hidden, so such
 * calls end here, and each goes on to the version that it has had since glibc came to this processor.
 *
 * What is missing in the table makes no wrong library: a wheel's tag is computed from the versions that are asked for.
 */
#if defined(__x86_64__)
#define FIRST GLIBC_2.2.5
#define DLMOPEN GLIBC_2.3.4
#define JUMP jmp
#elif defined(__aarch64__)
#define FIRST GLIBC_2.17
#define DLMOPEN GLIBC_2.17
#define JUMP b
#else
#error "the versions of glibc's functions are known for x86-64 and aarch64 only"
#endif

.macro forward version, names:vararg
.irp name, \names
  .symver first_\name, \name@\version
  .globl \name
  .hidden \name
  .type \name, %function
\name:
  JUMP first_\name
  .size \name, . - \name
.endr
.endm

.text
forward FIRST, dlclose, dlerror, dlopen, dlsym, dlvsym, shm_open, shm_unlink
forward DLMOPEN, dlmopen
forward FIRST, pthread_condattr_setpshared, pthread_create, pthread_detach, pthread_getspecific, pthread_join
forward FIRST, pthread_key_create, pthread_key_delete, pthread_kill, pthread_mutex_trylock, pthread_mutexattr_destroy
forward FIRST, pthread_mutexattr_init, pthread_mutexattr_setpshared, pthread_mutexattr_settype, pthread_once
forward FIRST, pthread_rwlock_destroy, pthread_rwlock_init, pthread_rwlock_rdlock, pthread_rwlock_timedrdlock
forward FIRST, pthread_rwlock_timedwrlock, pthread_rwlock_tryrdlock, pthread_rwlock_trywrlock, pthread_rwlock_unlock
forward FIRST, pthread_rwlock_wrlock, pthread_rwlockattr_destroy, pthread_rwlockattr_init
forward FIRST, pthread_rwlockattr_setpshared, pthread_setspecific, pthread_spin_destroy, pthread_spin_init
forward FIRST, pthread_spin_lock, pthread_spin_trylock, pthread_spin_unlock
forward FIRST, sem_destroy, sem_init, sem_post, sem_timedwait, sem_trywait, sem_wait

/* From glibc 2.32 libstdc++ leaves atomic instructions out while this says that there is one thread. It never does. */
.data
.globl __libc_single_threaded
.hidden __libc_single_threaded
.type __libc_single_threaded, %object
.size __libc_single_threaded, 1
__libc_single_threaded:
  .byte 0

.section .note.GNU-stack, "", %progbits
