/* Network cards: the first is eth0, further ones are known by their MAC; addresses, routes, name resolution. */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_CARDS 8

/* As in linux/ipv6.h, which does not go together with netinet/in.h. */
struct in6_request {
    struct in6_addr address;
    uint32_t prefix;
    int index;
};

struct card {
    char name[16], mac[18], address[16], netmask[16], address6[48];
};

static struct ifreq request_for(const char *interface) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%.15s", interface);
    return request;
}

static void set_address(int control, const char *interface, unsigned long command, const char *value) {
    struct ifreq request = request_for(interface);
    *(struct sockaddr_in *)&request.ifr_addr =
        (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(value)};
    if (ioctl(control, command, &request))
        say("cannot set %s of %s: %m", value, interface);
}

static void set_up(int control, const char *interface) {
    struct ifreq request = request_for(interface);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(control, SIOCSIFFLAGS, &request))
        say("cannot set up %s: %m", interface);
}

/* `ADDRESS/PREFIX`. The host lets nobody else have it, so the second that finding that out takes is spared. */
static void set_address6(int control6, const char *interface, const char *value) {
    char path[100], text[64];
    snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/accept_dad", interface);
    write_file(path, "0", 1, 0);
    snprintf(text, sizeof text, "%s", value);
    char *slash = strchr(text, '/');
    struct in6_request request = {.index = (int)if_nametoindex(interface)};
    if (slash)
        *slash = 0;
    request.prefix = slash ? (uint32_t)atoi(slash + 1) : 128;
    if (inet_pton(AF_INET6, text, &request.address) != 1 || ioctl(control6, SIOCSIFADDR, &request))
        say("cannot set %s of %s: %m", value, interface);
}

static void route_by(int control, const char *gateway) {
    struct rtentry route = {.rt_dst.sa_family = AF_INET, .rt_genmask.sa_family = AF_INET, .rt_flags = RTF_UP | RTF_GATEWAY};
    *(struct sockaddr_in *)&route.rt_gateway =
        (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(gateway)};
    if (ioctl(control, SIOCADDRT, &route))
        say("cannot set the gateway: %m");
}

static void route6_by(int control6, const char *gateway) {
    struct in6_rtmsg route = {.rtmsg_flags = RTF_UP | RTF_GATEWAY, .rtmsg_metric = 1024};
    route.rtmsg_ifindex = (int)if_nametoindex("eth0");
    if (inet_pton(AF_INET6, gateway, &route.rtmsg_gateway) != 1 || ioctl(control6, SIOCADDRT, &route))
        say("cannot set the IPv6 gateway: %m");
}

static void rename_interface(int control, const char *from, const char *to) {
    struct ifreq request = request_for(from);
    snprintf(request.ifr_newname, sizeof request.ifr_newname, "%.15s", to);
    if (strcmp(from, to) && ioctl(control, SIOCSIFNAME, &request))
        say("cannot rename %s to %s: %m", from, to);
}

/* The present name of the interface with this MAC; false if there is none. */
static bool find_interface(const char *mac, char *name, size_t room) {
    DIR *interfaces = opendir("/sys/class/net");
    struct dirent *entry;
    bool found = false;
    while (interfaces && !found && (entry = readdir(interfaces))) {
        char path[300];
        snprintf(path, sizeof path, "/sys/class/net/%s/address", entry->d_name);
        char *address = entry->d_name[0] == '.' ? NULL : read_file(path, NULL);
        found = address && !strncmp(address, mac, strlen(mac));
        if (found)
            snprintf(name, room, "%.15s", entry->d_name);
        free(address);
    }
    if (interfaces)
        closedir(interfaces);
    return found;
}

static int read_cards(struct card *cards) {
    int count = 0;
    for (; count < MAX_CARDS && config("card", count); count++) {
        struct card *card = &cards[count];
        if (sscanf(config("card", count), "%15s %17s %15s %15s %47s", card->name, card->mac, card->address, card->netmask,
                   card->address6) != 5)
            give_up("the configuration of network card %d is damaged", count);
    }
    return count;
}

/* Cards get the names that the host gave them; first names of no meaning, since two may have to change places. */
static void name_cards(int control, struct card *cards, int count) {
    char name[16], neutral[32];
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < count; i++) {
            snprintf(neutral, sizeof neutral, "card%d", i);
            if (find_interface(cards[i].mac, name, sizeof name))
                rename_interface(control, name, pass ? cards[i].name : neutral);
            else if (pass)
                say("there is no network card %s", cards[i].mac);
        }
}

static void configure_card(int control, int control6, const char *name, const char *address, const char *netmask,
                           const char *address6) {
    if (address && strcmp(address, "-")) {
        set_address(control, name, SIOCSIFADDR, address);
        set_address(control, name, SIOCSIFNETMASK, netmask);
    }
    set_up(control, name);
    if (address6 && strcmp(address6, "-"))
        set_address6(control6, name, address6);
}

void configure_network(void) {
    struct card cards[MAX_CARDS];
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), control6 = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int count = read_cards(cards);
    set_up(control, "lo");
    name_cards(control, cards, count);
    if (config("network", 0))
        configure_card(control, control6, "eth0", config("address", 0), config("netmask", 0), config("address6", 0));
    for (int i = 0; i < count; i++)
        configure_card(control, control6, cards[i].name, cards[i].address, cards[i].netmask, cards[i].address6);
    if (config("gateway", 0))
        route_by(control, config("gateway", 0));
    if (config("gateway6", 0))
        route6_by(control6, config("gateway6", 0));
    close(control);
    close(control6);
}

bool plug_card(const char *text) {
    struct card card;
    char name[16];
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), control6 = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sscanf(text, "%15s %17s %15s %15s %47s", card.name, card.mac, card.address, card.netmask, card.address6) != 5)
        return false;
    for (int attempt = 0; !find_interface(card.mac, name, sizeof name); attempt++) {
        if (attempt == 1000)
            return false;
        usleep(20000);
    }
    rename_interface(control, name, card.name);
    configure_card(control, control6, card.name, card.address, card.netmask, card.address6);
    return true;
}

/* `link` is where /etc/resolv.conf leads; its folders are made as far as they lie in /run. */
static void write_below_run(const char *link, const char *text) {
    char path[300];
    char *at = strstr(link, "run/");
    if (!at || strstr(at, ".."))
        return;
    snprintf(path, sizeof path, "/new/%s", at);
    for (char *slash = strchr(path + 5, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0755);
        *slash = '/';
    }
    write_file(path, text, strlen(text), 0644);
}

/* Mounted over the tree's own, as in a container: what the host knows of the machine is not written into its delta. */
static void show_in_etc(const char *name, const char *text) {
    char source[64], target[64];
    snprintf(source, sizeof source, "/new/run/triarch/%s", name);
    snprintf(target, sizeof target, "/new/etc/%s", name);
    mkdir("/new/run/triarch", 0755);
    write_file(source, text, strlen(text), 0644);
    int place = open(target, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (place < 0 || mount(source, target, NULL, MS_BIND, NULL))
        say("cannot mount %s: %m", name);
    close(place);
}

void configure_names(void) {
    char text[900];
    const char *name = config("hostname", 0) ?: "machine", *domain = config("domain", 0);
    const char *addresses[] = {config("address", 0), config("address6", 0)};
    snprintf(text, sizeof text, "%.63s\n", name);
    show_in_etc("hostname", text);
    int size = sprintf(text, "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    if (!addresses[0] && !addresses[1])
        addresses[0] = "127.0.1.1";
    for (int i = 0; i < 2; i++)
        if (addresses[i])
            size += sprintf(text + size, "%.*s %.63s%s%.100s %.63s\n", (int)strcspn(addresses[i], "/"), addresses[i], name,
                            domain ? "." : "", domain ?: "", domain ? name : "");
    show_in_etc("hosts", text);
}

void configure_resolver(void) {
    char text[400], target[256];
    if (!config("nameserver", 0))
        return;
    snprintf(text, sizeof text, "nameserver %.63s\n%s%.100s\n", config("nameserver", 0),
             config("domain", 0) ? "search " : "", config("domain", 0) ?: "");
    ssize_t length = readlink("/new/etc/resolv.conf", target, sizeof target - 1);
    if (length > 0) {
        target[length] = 0;
        write_below_run(target, text);
        return;
    }
    show_in_etc("resolv.conf", text);
}

/* Cards whose addresses the host gave are none of networkd's business; others it asks for by DHCP. */
void configure_networkd(void) {
    static const char ours[] = "[Link]\nUnmanaged=yes\n";
    static const char asks[] = "[Network]\nDHCP=yes\n[DHCP]\nClientIdentifier=mac\n";
    struct card cards[MAX_CARDS];
    int count = read_cards(cards);
    mkdir("/new/run/systemd", 0755);
    mkdir("/new/run/systemd/network", 0755);
    for (int i = -1; i < count; i++) {
        char path[100], text[200];
        bool given = i < 0 ? config("address", 0) != NULL : strcmp(cards[i].address, "-") != 0;
        const char *name = i < 0 ? "eth0" : cards[i].name;
        snprintf(path, sizeof path, "/new/run/systemd/network/%02d-triarch.network", i + 1);
        snprintf(text, sizeof text, "[Match]\nName=%s\n%s", name, given ? ours : asks);
        write_file(path, text, strlen(text), 0644);
    }
}
