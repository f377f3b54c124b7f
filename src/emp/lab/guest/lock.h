/* ---- locks: byte ranges of files, held until they are dropped (busybox has no flock) -------------------------------- */

enum { LOCKS = 8 };
static struct lock { char path[96]; int fd; uint64_t since_us, beats; } locks[LOCKS];
static pthread_mutex_t lock_admin = PTHREAD_MUTEX_INITIALIZER; /* also over I/O: who asks waits as long as the file does */

static struct lock *lock_of(const char *path) /* NULL: a free one */
{
    for (int i = 0; i < LOCKS; i++) {
        if (path ? !strcmp(locks[i].path, path) : !locks[i].path[0])
            return &locks[i];
    }
    return NULL;
}

/* Writes under the lock: a client whose server has given the lock away gets an error here, and no new lock. */
static const char *lock_beat(struct lock *lock)
{
    uint64_t beat = lock->beats + 1;
    if (pwrite(lock->fd, &beat, sizeof beat, 0) != sizeof beat || fdatasync(lock->fd))
        return strerror(errno);
    lock->beats = beat;
    return NULL;
}

static void put_lock(struct buf *out, struct lock *lock)
{
    const char *error = lock_beat(lock);
    put(out, "{\"path\": \"%s\", \"held\": %s, \"held_s\": %.3f, \"beats\": %llu, \"last_error\": \"%s\"}", lock->path,
        error ? "false" : "true", (double)(now_us(CLOCK_MONOTONIC) - lock->since_us) / 1e6, (unsigned long long)lock->beats,
        error ? error : "");
}

static void lock_take(struct buf *out, const char *path)
{
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = sizeof(uint64_t)};
    struct lock *lock = lock_of(path) ? NULL : lock_of(NULL);
    if (!lock) {
        put(out, "{\"error\": \"%s\"}", lock_of(path) ? "it is held here already" : "too many locks");
        return;
    }
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || fcntl(fd, F_OFD_SETLK, &range)) { /* does not wait: who is refused is to hear it */
        put(out, "{\"error\": \"%s: %s\"}", path, errno == EAGAIN || errno == EACCES ? "locked by another" : strerror(errno));
        if (fd >= 0)
            close(fd);
        return;
    }
    snprintf(lock->path, sizeof lock->path, "%s", path);
    lock->fd = fd, lock->since_us = now_us(CLOCK_MONOTONIC), lock->beats = 0;
    put_lock(out, lock);
}

/* `lock take PATH` makes the file if need be, and does not wait; `lock drop PATH`; `lock status` writes under each lock. */
static void cmd_lock(struct buf *out, int argc, char **argv)
{
    const char *verb = argc > 1 ? argv[1] : "", *path = argc == 3 ? argv[2] : "", *comma = "";
    bool named = path[0] == '/' && strlen(path) < sizeof locks->path;
    struct lock *lock;
    pthread_mutex_lock(&lock_admin);
    if (!strcmp(verb, "take") && named) {
        lock_take(out, path);
    } else if (!strcmp(verb, "drop") && named && (lock = lock_of(path))) {
        close(lock->fd);
        lock->path[0] = 0;
        put(out, "{\"path\": \"%s\", \"held\": false}", path);
    } else if (!strcmp(verb, "status")) {
        put(out, "[");
        for (int i = 0; i < LOCKS; i++) {
            if (locks[i].path[0])
                put(out, "%s", comma), put_lock(out, &locks[i]), comma = ", ";
        }
        put(out, "]");
    } else {
        put(out, "{\"error\": \"usage: lock take PATH | drop PATH (of one that is held) | status\"}");
    }
    pthread_mutex_unlock(&lock_admin);
}
