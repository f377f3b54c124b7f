/* ---- the wire: an address more, and words in the name of an address that may be another's --------------------------- */

static const char *wire_device(void) /* where the first NIC's addresses are; in a pod its only one */
{
    return access("/sys/class/net/br0", F_OK) ? "eth0" : "br0";
}

/* Announces an IPv4 address from our own MAC, as request and as reply (RFC 5227), whoever has it. */
static const char *wire_claim(const char *address)
{
    unsigned char frame[42] = {255, 255, 255, 255, 255, 255, [12] = 8, 6, 0, 1, 8, 0, 6, 4, 0, 1};
    struct ifreq device = {0};
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(wire_device())};
    const char *error = NULL;
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    strncpy(device.ifr_name, wire_device(), IFNAMSIZ - 1);
    if (fd < 0 || ioctl(fd, SIOCGIFHWADDR, &device) || inet_pton(AF_INET, address, frame + 28) != 1)
        error = "no such device or address";
    memcpy(frame + 6, device.ifr_hwaddr.sa_data, 6);
    memcpy(frame + 22, device.ifr_hwaddr.sa_data, 6);
    memcpy(frame + 38, frame + 28, 4);
    for (frame[21] = 1; !error && frame[21] <= 2; frame[21]++) {
        if (sendto(fd, frame, sizeof frame, 0, (struct sockaddr *)&to, sizeof to) != sizeof frame)
            error = strerror(errno);
    }
    if (fd >= 0)
        close(fd);
    return error;
}

static const char *wire_change(const char *verb, char *address) /* ADDRESS/PREFIX */
{
    char *const command[] = {"ip", "address", (char *)verb, address, "dev", (char *)wire_device(), NULL};
    int status = -1;
    pid_t child = fork();
    if (!child) {
        execvp(command[0], command);
        _exit(127);
    }
    return child < 0 || waitpid(child, &status, 0) < 0 || status ? "ip refuses that" : NULL;
}

static const char *wire_join(const char *group) /* for as long as the guest lives */
{
    struct ip_mreqn request = {.imr_ifindex = (int)if_nametoindex(wire_device())};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (inet_pton(AF_INET, group, &request.imr_multiaddr) != 1)
        return "no such group";
    return setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &request, sizeof request) ? strerror(errno) : NULL;
}

static void cmd_wire(struct buf *out, int argc, char **argv) /* wire add|del ADDRESS/PREFIX, claim ADDRESS, join GROUP */
{
    const char *error = "usage: wire add|del ADDRESS/PREFIX | wire claim ADDRESS | wire join GROUP";
    if (argc == 3 && !strcmp(argv[1], "claim"))
        error = wire_claim(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "join"))
        error = wire_join(argv[2]);
    else if (argc == 3 && (!strcmp(argv[1], "add") || !strcmp(argv[1], "del")))
        error = wire_change(argv[1], argv[2]);
    if (!error && !strcmp(argv[1], "add")) { /* the kernel does not announce it by itself while the device is up */
        char *prefix = strchr(argv[2], '/');
        if (prefix)
            *prefix = 0;
        error = wire_claim(argv[2]);
    }
    if (error)
        put(out, "{\"error\": \"%s\"}", error);
    else
        put(out, "{\"%s\": \"%s\"}", argv[1], argv[2]);
}
