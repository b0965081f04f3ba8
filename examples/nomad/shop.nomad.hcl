# A BEAM release with an agent of its own beside it, in one group of tasks.
# Needs Nomad 1.7 (Consul tokens by workload identity), Docker, and a Consul agent on each client.

job "shop" {
  type = "service"

  group "shop" {
    count = 2

    network {
      mode = "host"
      port "mesh" {}
    }

    # Starts first and stays as long as the release does.
    task "meshx" {
      driver = "docker"
      user   = "nobody"

      lifecycle {
        hook    = "prestart"
        sidecar = true
      }

      # Puts a token of this workload into the file below.
      consul {}

      env {
        CONSUL_HTTP_ADDR       = "http://127.0.0.1:8500"
        CONSUL_HTTP_TOKEN_FILE = "${NOMAD_SECRETS_DIR}/consul_token"
      }

      config {
        image        = "registry.example/shop:0.1.0"
        network_mode = "host"
        command      = "/bin/sh"
        # Everybody may write the directory that the tasks of a group share; sticky, no name in it can be taken away.
        args = [
          "-c", "chmod +t \"$NOMAD_ALLOC_DIR\" && exec \"$@\"", "sh",
          "meshx", "agent",
          "--mesh", "consul",
          "--dir", "${NOMAD_ALLOC_DIR}/meshx",
          "--host", "${NOMAD_SHORT_ALLOC_ID}",
          "--bind", "${NOMAD_ADDR_mesh}",
          "--log-format", "json",
        ]
      }

      resources {
        cpu    = 200
        memory = 128
      }
    }

    # Ends while no agent answers, and is started again.
    task "shop" {
      driver = "docker"
      # The same as the agent's: no other user may be a service unless --allow-register says so.
      user = "nobody"

      env {
        MESHX_DIR            = "${NOMAD_ALLOC_DIR}/meshx"
        RELEASE_DISTRIBUTION = "none"
        RELEASE_TMP          = "${NOMAD_TASK_DIR}"
        HOME                 = "${NOMAD_TASK_DIR}"
      }

      config {
        image        = "registry.example/shop:0.1.0"
        network_mode = "host"
        command      = "meshx"
        args = [
          "run", "shop@${NOMAD_SHORT_ALLOC_ID}",
          "--ebin", "/opt/shop/ebin",
          "--",
          "/opt/shop/bin/shop", "start",
        ]
      }

      kill_timeout = "30s"

      resources {
        cpu    = 500
        memory = 512
      }
    }

    restart {
      attempts = 10
      interval = "5m"
      delay    = "1s"
      mode     = "delay"
    }
  }
}
