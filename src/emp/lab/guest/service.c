/*
 * The guest service: what lives inside an EVM (and inside each of its pods) so that anybody outside can check what a
 * migration kept. One process per network namespace: `emp-guest evm NAME` or `emp-guest pod NAME`.
 *
 *   UDP, TCP 7777  echo: the reply is the request's own bytes, a blank, a reply counter, a blank, the boot id, newline
 *                  (TCP: per line, the newline of the request comes last)
 *   UDP 7779       sink: datagrams are counted and not answered (one-way streams; `streams.h` has the numbered ones)
 *   TCP 7779       takes bulk data and compares it; TCP 7780 gives the same without end
 *   TCP 7778       control: one command per line, one line of JSON per answer; see `commands` at the end
 *
 * `emp-guest agent PORT` is another process, which tells the host the time over a serial port; `agent.h`.
 *
 * One thread owns the sockets (epoll). Memory rewriting and each journal have threads of their own, and a command that
 * can block runs in a thread of its own, so that an echo never waits for memory or for a disk.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/input.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { ECHO_PORT = 7777, CONTROL_PORT = 7778, SINK_PORT = 7779, SOURCE_PORT = 7780 };
enum { PAGE_BYTES = 4096, BATCH = 64, DATAGRAM_BYTES = 65536, LINE_BYTES = 65536, OUT_BYTES = 262144, ARGS = 8 };

static char boot_id[40], role[8] = "evm", name[64] = "emp";
static struct { _Atomic uint64_t replies, udp, tcp, sink, connections, dropped; } counts;

static uint64_t now_us(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void sleep_us(uint64_t us)
{
    struct timespec t = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
}

/* ---- growing buffers ---------------------------------------------------------------------------------------- */

struct buf { char *p; size_t len, cap; };

static void reserve(struct buf *b, size_t more)
{
    if (b->len + more <= b->cap)
        return;
    b->cap = (b->len + more) * 2;
    b->p = realloc(b->p, b->cap);
    if (!b->p)
        abort();
}

static void append(struct buf *b, const void *data, size_t len)
{
    reserve(b, len);
    memcpy(b->p + b->len, data, len);
    b->len += len;
}

__attribute__((format(printf, 2, 3))) static void put(struct buf *b, const char *format, ...)
{
    va_list args;
    reserve(b, 1024);
    va_start(args, format);
    int n = vsnprintf(b->p + b->len, 1024, format, args);
    va_end(args);
    b->len += n < 1024 ? (size_t)n : 1023;
}

#include "memory.h"
#include "journal.h"
#include "lock.h"
#include "streams.h"
#include "wire.h"
#include "agent.h"
#include "clock.h"

/* ---- sockets ------------------------------------------------------------------------------------------------------ */

enum kind {
    ECHO_LISTEN, CONTROL_LISTEN, SINK_LISTEN, SOURCE_LISTEN, ECHO_UDP, SINK_UDP, JOBS_DONE,
    ECHO_CONN, CONTROL_CONN, SINK_CONN, SOURCE_CONN, /* in the listeners' order */
};
struct source { enum kind kind; int fd; };
struct conn {
    struct source source; /* first: epoll hands it out */
    bool busy, gone, eof; /* a command runs; closed; the peer sends no more */
    uint32_t events;
    struct buf in, out;
    size_t sent;
    struct conn *next; /* in `graves` */
};
static int epoll_fd, jobs_done_fd;
static struct conn *graves; /* freed at the end of a round of events, which may still name them */

static size_t reply_suffix(char *out) /* " COUNTER BOOT_ID\n" */
{
    char digits[24], *d = digits + sizeof digits, *o = out;
    uint64_t n = atomic_fetch_add(&counts.replies, 1) + 1;
    do
        *--d = (char)('0' + n % 10);
    while (n /= 10);
    *o++ = ' ';
    o = mempcpy(o, d, (size_t)(digits + sizeof digits - d));
    *o++ = ' ';
    o = mempcpy(o, boot_id, 36);
    *o++ = '\n';
    return (size_t)(o - out);
}

static void udp_ready(struct source *source)
{
    static struct mmsghdr in[BATCH], out[BATCH];
    static struct iovec in_parts[BATCH], out_parts[BATCH][2];
    static struct sockaddr_in6 peers[BATCH];
    static union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(struct in6_pktinfo))]; } controls[BATCH];
    static char data[BATCH][DATAGRAM_BYTES], suffixes[BATCH][80];
    for (int i = 0; i < BATCH; i++) {
        in_parts[i] = (struct iovec){data[i], DATAGRAM_BYTES};
        in[i].msg_hdr = (struct msghdr){.msg_name = &peers[i], .msg_namelen = sizeof peers[i], .msg_iov = &in_parts[i],
            .msg_iovlen = 1, .msg_control = &controls[i], .msg_controllen = sizeof controls[i]};
    }
    int n = recvmmsg(source->fd, in, BATCH, MSG_DONTWAIT, NULL);
    if (n <= 0)
        return;
    counts.udp += (uint64_t)n;
    for (int i = 0; i < n; i++) {
        struct cmsghdr *c = CMSG_FIRSTHDR(&in[i].msg_hdr);
        if (c) { /* answer from the address that was asked; the route is found by it, not by the interface */
            struct in6_pktinfo *info = (struct in6_pktinfo *)CMSG_DATA(c);
            if (!IN6_IS_ADDR_LINKLOCAL(&info->ipi6_addr))
                info->ipi6_ifindex = 0;
        }
        out_parts[i][0] = (struct iovec){data[i], in[i].msg_len};
        out_parts[i][1] = (struct iovec){suffixes[i], reply_suffix(suffixes[i])};
        out[i].msg_hdr = in[i].msg_hdr;
        out[i].msg_hdr.msg_iov = out_parts[i], out[i].msg_hdr.msg_iovlen = 2, out[i].msg_hdr.msg_flags = 0;
    }
    for (int sent = 0; sent < n;) {
        int m = sendmmsg(source->fd, out + sent, (unsigned)(n - sent), MSG_DONTWAIT);
        if (m < 0)
            counts.dropped++; /* that one, not those behind it */
        sent += m > 0 ? m : 1;
    }
}

static void conn_close(struct conn *c)
{
    if (c->source.fd >= 0) {
        close(c->source.fd);
        counts.connections--;
    }
    c->source.fd = -1;
    c->gone = true;
    if (!c->busy)
        c->next = graves, graves = c;
}

static void conn_want(struct conn *c)
{
    size_t unsent = c->out.len - c->sent;
    uint32_t events = (!c->busy && !c->eof && unsent < OUT_BYTES ? EPOLLIN : 0u) | (unsent ? EPOLLOUT : 0u);
    if (events != c->events) {
        struct epoll_event event = {.events = events, .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->source.fd, &event);
        c->events = events;
    }
}

static bool conn_flush(struct conn *c)
{
    while (c->sent < c->out.len) {
        ssize_t n = send(c->source.fd, c->out.p + c->sent, c->out.len - c->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0)
            return errno == EAGAIN || errno == EINTR;
        c->sent += (size_t)n;
    }
    c->out.len = c->sent = 0;
    return true;
}

static void job_begin(struct conn *c, const char *line, size_t len);

static void conn_lines(struct conn *c) /* answer every whole line in c->in */
{
    size_t at = 0;
    char *newline, suffix[80];
    while (!c->busy && (newline = memchr(c->in.p + at, '\n', c->in.len - at))) {
        size_t len = (size_t)(newline - c->in.p) - at;
        if (c->source.kind == ECHO_CONN) {
            append(&c->out, c->in.p + at, len);
            append(&c->out, suffix, reply_suffix(suffix));
            counts.tcp++;
        } else {
            job_begin(c, c->in.p + at, len);
        }
        at += len + 1;
    }
    if (at)
        memmove(c->in.p, c->in.p + at, c->in.len -= at);
}

static void conn_ready(struct conn *c, uint32_t events)
{
    bool alive = !(events & EPOLLERR) && !(c->busy && events & EPOLLHUP);
    if (alive && events & EPOLLIN && !c->busy) {
        reserve(&c->in, 4096);
        ssize_t n = recv(c->source.fd, c->in.p + c->in.len, c->in.cap - c->in.len, MSG_DONTWAIT);
        alive = n >= 0 || errno == EAGAIN || errno == EINTR;
        c->eof = n == 0;
        c->in.len += n > 0 ? (size_t)n : 0;
        conn_lines(c);
        alive = alive && c->in.len < LINE_BYTES;
    }
    if (alive && conn_flush(c) && !(c->eof && !c->busy && !c->out.len))
        conn_want(c);
    else
        conn_close(c);
}

static void bulk_ready(struct conn *c, uint32_t events)
{
    bool alive = !(events & EPOLLERR);
    if (alive && events & EPOLLIN)
        alive = bulk_take(c->source.fd, &c->sent);
    if (alive && events & EPOLLOUT)
        alive = bulk_give(c->source.fd, &c->sent);
    if (!alive)
        conn_close(c);
}

static void watch(struct source *source, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = source};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, source->fd, &event))
        perror("epoll_ctl"), exit(1);
}

static void accept_ready(struct source *source)
{
    int fd, on = 1;
    while ((fd = accept4(source->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
        struct conn *c = calloc(1, sizeof *c);
        if (!c)
            abort();
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        c->source = (struct source){source->kind - ECHO_LISTEN + ECHO_CONN, fd};
        c->events = EPOLLIN | (source->kind == SOURCE_LISTEN ? EPOLLOUT : 0u);
        counts.connections++;
        watch(&c->source, c->events);
    }
}

static void open_port(enum kind kind, int type, uint16_t port)
{
    struct source *source = malloc(sizeof *source);
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = in6addr_any};
    int on = 1, off = 0, bytes = 16 << 20;
    *source = (struct source){kind, socket(AF_INET6, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    setsockopt(source->fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    setsockopt(source->fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
    setsockopt(source->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (type == SOCK_DGRAM) { /* room for what queues up while the guest is stopped */
        setsockopt(source->fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
        setsockopt(source->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
    }
    if (bind(source->fd, (struct sockaddr *)&any, sizeof any) || (type == SOCK_STREAM && listen(source->fd, 4096)))
        perror("bind"), exit(1);
    watch(source, EPOLLIN);
}

/* ---- control ------------------------------------------------------------------------------------------------------ */

static void cmd_status(struct buf *out, int argc, char **argv)
{
    (void)argc, (void)argv;
    put(out, "{\"boot_id\": \"%s\", \"role\": \"%s\", \"name\": \"%s\", \"uptime_s\": %.3f, \"echo\": {\"udp\": %llu, "
        "\"tcp\": %llu, \"replies\": %llu, \"dropped\": %llu, \"sink\": %llu, \"connections\": %llu}, \"memory\": ", boot_id, role,
        name, (double)now_us(CLOCK_BOOTTIME) / 1e6, (unsigned long long)counts.udp, (unsigned long long)counts.tcp,
        (unsigned long long)counts.replies, (unsigned long long)counts.dropped, (unsigned long long)counts.sink,
        (unsigned long long)counts.connections);
    put_memory(out);
    put(out, ", \"journals\": ");
    put_journals(out);
    put(out, "}");
}

static void cmd_random(struct buf *out, int argc, char **argv) /* 16 bytes of /dev/urandom's generator */
{
    unsigned char bytes[16];
    (void)argc, (void)argv;
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) {
        put(out, "{\"error\": \"%s\"}", strerror(errno));
        return;
    }
    put(out, "{\"random\": \"");
    for (size_t i = 0; i < sizeof bytes; i++)
        put(out, "%02x", bytes[i]);
    put(out, "\"}");
}

static void power(int how)
{
    sync();
    reboot(how);
}

static void cmd_poweroff(struct buf *out, int argc, char **argv)
{
    (void)argc;
    put(out, "{\"%s\": true}", argv[0]); /* never sent when it works: the connection dies with the guest */
    power(argv[0][0] == 'p' ? RB_POWER_OFF : RB_AUTOBOOT);
}

static const struct command { const char *name; void (*run)(struct buf *out, int argc, char **argv); } commands[] = {
    {"status", cmd_status}, {"memory", cmd_memory}, {"verify", cmd_verify}, {"corrupt", cmd_corrupt},
    {"journal", cmd_journal}, {"lock", cmd_lock}, {"disks", cmd_disks}, {"sink", cmd_sink}, {"bulk", cmd_bulk},
    {"wire", cmd_wire}, {"clock", cmd_clock}, {"random", cmd_random}, {"poweroff", cmd_poweroff}, {"reboot", cmd_poweroff},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

/* A command runs in a thread of its own; its answer comes back to the event loop through `jobs_done`. */
static struct job { struct conn *conn; char *line; struct buf out; struct job *next; } *jobs_done;
static pthread_mutex_t jobs_lock = PTHREAD_MUTEX_INITIALIZER;

static void *job_run(void *arg)
{
    struct job *job = arg;
    char *argv[ARGS + 1] = {0}, *rest = job->line;
    int argc = 0;
    while (argc < ARGS && (argv[argc] = strtok_r(rest, " \t\r", &rest)))
        argc++;
    for (int i = 0; i < COMMANDS && argc && !job->out.len; i++) {
        if (!strcmp(argv[0], commands[i].name))
            commands[i].run(&job->out, argc, argv);
    }
    if (!job->out.len) {
        put(&job->out, "{\"error\": \"unknown command\", \"commands\": [");
        for (int i = 0; i < COMMANDS; i++)
            put(&job->out, "%s\"%s\"", i ? ", " : "", commands[i].name);
        put(&job->out, "]}");
    }
    append(&job->out, "\n", 1);
    pthread_mutex_lock(&jobs_lock);
    job->next = jobs_done, jobs_done = job;
    pthread_mutex_unlock(&jobs_lock);
    eventfd_write(jobs_done_fd, 1);
    return NULL;
}

static void job_begin(struct conn *c, const char *line, size_t len)
{
    struct job *job = calloc(1, sizeof *job);
    pthread_t thread;
    if (!job || !(job->line = strndup(line, len)))
        abort();
    job->conn = c;
    c->busy = true;
    for (char *p = job->line; *p; p++) /* what is echoed in an answer must not break its JSON */
        *p = strchr("\"\\", *p) || !isprint((unsigned char)*p) ? ' ' : *p;
    if (pthread_create(&thread, NULL, job_run, job))
        abort();
    pthread_detach(thread);
}

static void jobs_ready(void)
{
    eventfd_t unused;
    eventfd_read(jobs_done_fd, &unused);
    pthread_mutex_lock(&jobs_lock);
    struct job *job = jobs_done, *next;
    jobs_done = NULL;
    pthread_mutex_unlock(&jobs_lock);
    for (; job; job = next) {
        struct conn *c = job->conn;
        c->busy = false;
        if (!c->gone) {
            append(&c->out, job->out.p, job->out.len);
            conn_lines(c);
        }
        if (c->gone || !conn_flush(c))
            conn_close(c);
        else
            conn_want(c);
        next = job->next;
        free(job->line), free(job->out.p), free(job);
    }
}

/* ---- start -------------------------------------------------------------------------------------------------------- */

/* Waits in the background until the host presses it, then runs the command, or without one powers off; every input device
   may be the one. A press is heard from when this returns on: the shell's prompt comes after it. */
static int power_button(char **command)
{
    char path[40];
    struct input_event key;
    struct pollfd devices[8];
    for (int i = 0; i < 8; i++) {
        snprintf(path, sizeof path, "/dev/input/event%d", i);
        devices[i] = (struct pollfd){.fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC), .events = POLLIN};
    }
    if (daemon(0, 1))
        return 1;
    while (poll(devices, 8, -1) > 0) {
        for (int i = 0; i < 8; i++) {
            while (devices[i].fd >= 0 && read(devices[i].fd, &key, sizeof key) == sizeof key) {
                if (key.type != EV_KEY || key.code != KEY_POWER || !key.value)
                    continue;
                if (*command)
                    execvp(*command, command);
                power(RB_POWER_OFF);
            }
        }
    }
    return 1;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    struct rlimit files = {65536, 65536};
    if (argc > 2 && !strcmp(argv[1], "realtime")) { /* run a command that no kernel thread can preempt; for init */
        sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1});
        execvp(argv[2], argv + 2);
        return 127;
    }
    if (argc >= 2 && !strcmp(argv[1], "power-button"))
        return power_button(argv + 2);
    if (argc == 3 && !strcmp(argv[1], "agent"))
        return agent(argv[2]);
    if (argc != 3 || (strcmp(argv[1], "evm") && strcmp(argv[1], "pod"))) {
        fprintf(stderr, "usage: %s evm|pod NAME | agent PORT | power-button [COMMAND...] | realtime COMMAND...\n", argv[0]);
        return 2;
    }
    snprintf(role, sizeof role, "%s", argv[1]);
    snprintf(name, sizeof name, "%s", argv[2]);
    if (read_file(boot_id, sizeof boot_id, "/proc/sys/kernel/random/%s", "boot_id") < 36)
        return 1;
    boot_id[36] = 0;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xedb88320 : crc >> 1;
        crc_table[i] = crc;
    }
    bulk_fill();
    signal(SIGPIPE, SIG_IGN);
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_NAME, name); /* `ps` in the guest shows which pod it is */
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    jobs_done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct source done = {JOBS_DONE, jobs_done_fd};
    watch(&done, EPOLLIN);
    open_port(ECHO_UDP, SOCK_DGRAM, ECHO_PORT);
    open_port(ECHO_LISTEN, SOCK_STREAM, ECHO_PORT);
    open_port(SINK_UDP, SOCK_DGRAM, SINK_PORT);
    open_port(SINK_LISTEN, SOCK_STREAM, SINK_PORT);
    open_port(SOURCE_LISTEN, SOCK_STREAM, SOURCE_PORT);
    open_port(CONTROL_LISTEN, SOCK_STREAM, CONTROL_PORT);
    if (pthread_create(&thread, NULL, rewriter, NULL))
        return 1;
    for (;;) {
        struct epoll_event events[256];
        int n = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < n; i++) {
            struct source *source = events[i].data.ptr;
            switch (source->kind) {
            case ECHO_LISTEN: case CONTROL_LISTEN: case SINK_LISTEN: case SOURCE_LISTEN: accept_ready(source); break;
            case ECHO_UDP: udp_ready(source); break;
            case SINK_UDP: sink_ready(source->fd); break;
            case JOBS_DONE: jobs_ready(); break;
            case SINK_CONN: case SOURCE_CONN:
                if (!((struct conn *)source)->gone)
                    bulk_ready((struct conn *)source, events[i].events);
                break;
            case ECHO_CONN: case CONTROL_CONN:
                if (!((struct conn *)source)->gone)
                    conn_ready((struct conn *)source, events[i].events);
            }
        }
        for (struct conn *c; (c = graves);) {
            graves = c->next;
            free(c->in.p), free(c->out.p), free(c);
        }
    }
}
