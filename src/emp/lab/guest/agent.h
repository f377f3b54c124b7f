/* ---- the agent: QEMU's guest agent protocol on a serial port, as far as the host asks for the time -------------------
   A line of JSON each way ("QEMU Guest Agent Protocol Reference"). Not `qemu-ga` itself, which this image has no room
   for; the image `debian` has that. A process of its own, `emp-agent` in `ps`. */

static int agent_open(const char *path) /* raw, and as fast as the port goes: at 9600 Baud it waits 4 ms for a line's end */
{
    struct termios raw;
    int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || tcgetattr(fd, &raw))
        return -1;
    cfmakeraw(&raw);
    cfsetspeed(&raw, B115200);
    raw.c_cflag |= CLOCAL | CREAD;
    raw.c_cc[VMIN] = 1, raw.c_cc[VTIME] = 0;
    return tcsetattr(fd, TCSANOW, &raw) ? -1 : fd;
}

static const char *agent_after(const char *line, const char *key) /* what follows "KEY" and the colon; NULL without it */
{
    const char *at = strstr(line, key);
    return at ? at + strlen(key) + strspn(at + strlen(key), " :") : NULL;
}

/* Never back: an order that comes late may name a time that is over. The real `qemu-ga` would set that. */
static const char *agent_set_time(const char *line)
{
    const char *time = agent_after(line, "\"time\"");
    long long ns = time ? atoll(time) : 0;
    struct timespec now, wanted = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    if (ns <= 0)
        return "time is missing";
    clock_gettime(CLOCK_REALTIME, &now);
    if (wanted.tv_sec < now.tv_sec || (wanted.tv_sec == now.tv_sec && wanted.tv_nsec < now.tv_nsec))
        return "the clock is beyond that already, and is not set back";
    return clock_settime(CLOCK_REALTIME, &wanted) ? strerror(errno) : NULL;
}

static void agent_answer(struct buf *out, const char *line)
{
    const char *command = agent_after(line, "\"execute\""), *id = agent_after(line, "\"id\""), *error;
    struct timespec now;
    char word[40] = "";
    if (command)
        sscanf(command, "\"%39[a-z-]", word);
    if (!strcmp(word, "guest-sync-delimited") || !strcmp(word, "guest-sync")) {
        put(out, "%s{\"return\": %lld}\n", word[10] ? "\xff" : "", id ? atoll(id) : 0);
    } else if (!strcmp(word, "guest-get-time")) {
        clock_gettime(CLOCK_REALTIME, &now);
        put(out, "{\"return\": %lld}\n", (long long)now.tv_sec * 1000000000 + now.tv_nsec);
    } else if (!strcmp(word, "guest-set-time")) {
        if ((error = agent_set_time(line)))
            put(out, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"%s\"}}\n", error);
        else
            put(out, "{\"return\": {}}\n");
    } else if (!strcmp(word, "guest-ping")) {
        put(out, "{\"return\": {}}\n");
    } else if (!strcmp(word, "guest-info")) {
        put(out, "{\"return\": {\"version\": \"emp-guest\", \"supported_commands\": []}}\n");
    } else {
        put(out, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command %s has not been found\"}}\n", word);
    }
}

static bool agent_write(int fd, const struct buf *out)
{
    for (size_t sent = 0; sent < out->len;) {
        ssize_t n = write(fd, out->p + sent, out->len - sent);
        if (n <= 0)
            return false;
        sent += (size_t)n;
    }
    return true;
}

static int agent(const char *path)
{
    struct buf out = {0};
    char line[1024], some[64];
    size_t len = 0;
    ssize_t n;
    int fd = agent_open(path);
    if (fd < 0)
        return perror(path), 1;
    prctl(PR_SET_NAME, "emp-agent");
    while ((n = read(fd, some, sizeof some)) > 0) {
        for (ssize_t i = 0; i < n; i++) {
            if (some[i] == '\xff') { /* another client: what the one before has left is no line */
                len = 0;
            } else if (some[i] != '\n') {
                line[len] = some[i];
                len += len < sizeof line - 1;
            } else {
                line[len] = 0, len = 0, out.len = 0;
                agent_answer(&out, line);
                if (!agent_write(fd, &out))
                    return 1;
            }
        }
    }
    return 1;
}
