// Asks containers/image, which podman, skopeo and CRI-O stand on, what a policy says of an image in a registry.
//
//	judge POLICY REGISTRIES.D REFERENCE...
//
// One line of JSON for each reference: {"accepted": …, "error": …}. Plain HTTP; nothing is copied or kept.
package main

import (
	"context"
	"encoding/json"
	"os"

	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/image"
	"go.podman.io/image/v5/signature"
	_ "go.podman.io/image/v5/transports/alltransports" // whose scopes a policy is checked for
	"go.podman.io/image/v5/types"
)

type verdict struct {
	Accepted bool   `json:"accepted"`
	Error    string `json:"error"`
}

func judge(policy *signature.PolicyContext, system *types.SystemContext, name string) verdict {
	reference, err := docker.ParseReference("//" + name)
	if err != nil {
		return verdict{false, err.Error()}
	}
	source, err := reference.NewImageSource(context.Background(), system)
	if err != nil {
		return verdict{false, err.Error()}
	}
	defer source.Close()
	accepted, err := policy.IsRunningImageAllowed(context.Background(), image.UnparsedInstance(source, nil))
	if err != nil {
		return verdict{false, err.Error()}
	}
	return verdict{accepted, ""}
}

func main() {
	encoder := json.NewEncoder(os.Stdout)
	parsed, err := signature.NewPolicyFromFile(os.Args[1])
	if err != nil {
		encoder.Encode(verdict{false, "policy: " + err.Error()})
		return
	}
	policy, err := signature.NewPolicyContext(parsed)
	if err != nil {
		panic(err)
	}
	system := &types.SystemContext{
		RegistriesDirPath:           os.Args[2],
		SystemRegistriesConfPath:    "/dev/null",
		DockerInsecureSkipTLSVerify: types.OptionalBoolTrue,
	}
	for _, name := range os.Args[3:] {
		encoder.Encode(judge(policy, system, name))
	}
}
