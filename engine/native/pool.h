// A pool of threads that run one function together, with a barrier. Inside a step a thread that waits spins for at most
// 50 us and then sleeps on a futex until the others arrive. Where spinning was in vain it sleeps almost at once from then
// on; one in 64 such waits is a long one again, to see whether spinning pays. Between steps threads spin, then yield for
// about 100 us, and then sleep. So engines leave their cores to others, and a call that follows at once finds the
// threads awake.
#pragma once

typedef struct im_pool im_pool;

im_pool *im_pool_new(int threads);  // NULL when threads cannot be made; the caller is thread 0
void im_pool_free(im_pool *pool);
void im_pool_run(im_pool *pool, void (*work)(void *argument, int thread), void *argument);
void im_pool_barrier(im_pool *pool, int thread);  // of all threads, inside `work`
int im_pool_take(im_pool *pool, int count);       // the next `count` of a shared counter; for uneven work
void im_pool_rewind(im_pool *pool);               // sets the counter to 0; one thread, with a barrier on both sides
