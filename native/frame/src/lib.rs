//! The MeshxRpc wire protocol: frames, checksums, reassembly, flow control.
