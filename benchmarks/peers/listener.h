/* The setup that the servers in C share. */

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>

enum { BACKLOG = 4096, FILES = 65536 };

static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

/* Raise the limit of descriptors as far as allowed, up to FILES. */
static inline void raise_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        die("getrlimit");
    limit.rlim_cur = limit.rlim_max < FILES ? limit.rlim_max : FILES;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
        die("setrlimit");
}

/* Return a TCP socket that listens on loopback, with extra socket(2) flags. Accepted sockets inherit TCP_NODELAY. */
static inline int listen_at(int port, int flags)
{
    int fd = socket(AF_INET, SOCK_STREAM | flags, 0);
    int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, BACKLOG) < 0)
        die("listen");
    return fd;
}
