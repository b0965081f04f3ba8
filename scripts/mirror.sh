# Sourced: the mirror that this machine's apt uses, and the keys it is checked with.

keys=/usr/share/keyrings/debian-archive-keyring.gpg

# Prints the mirror's address, or nothing when apt has none.
mirror() {
    local found
    found=$(known_mirror)
    if [ -z "$found" ] && [ "$(id -u)" = 0 ]; then
        # A new machine: apt has not asked its mirror for anything yet.
        apt-get -qq update >&2
        found=$(known_mirror)
    fi
    printf '%s' "$found"
}

known_mirror() {
    local suite
    suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    apt-get indextargets --format '$(SITE) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
        awk -v suite="$suite" '$2 == suite && $3 == "main" && !seen++ {print $1}'
}
